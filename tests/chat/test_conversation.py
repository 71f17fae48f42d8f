"""Turns into prompts: as transformers writes them, within the context, without running code."""

import json
import shutil

import pytest

from phi_lit.chat.conversation import Conversation, plain_renderer, renderer, stops_of_turn
from phi_lit.errors import UserError

TURNS = [
    {"role": "user", "content": "Hi, I'm Ada."},
    {"role": "assistant", "content": "Hello Ada!"},
    {"role": "user", "content": "Who am I?"},
]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_smollm2s_conversation_is_written_as_transformers_writes_it(smollm2, system):
    from litgpt.prompts import load_prompt_style
    from transformers import AutoTokenizer

    render = renderer(smollm2, load_prompt_style(smollm2))
    theirs = AutoTokenizer.from_pretrained(smollm2)
    for messages in (TURNS[:1], TURNS):
        expected = theirs.apply_chat_template(
            [*system, *messages], tokenize=False, add_generation_prompt=True
        )
        assert render([*system, *messages]) == expected


def test_a_template_gets_what_transformers_gives_it(tmp_path, smollm2):
    from litgpt.prompts import load_prompt_style
    from transformers import AutoTokenizer

    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m | tojson }}"
        "{% endgeneration %}{% else %}{{ m | tojson(indent=2) }}{% continue %}{% endif %}\n"
        "{% endfor %}{{ bos_token }}"
    )
    shutil.copytree(smollm2, tmp_path / "model", ignore=shutil.ignore_patterns("*.pth"))
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    turns = [TURNS[0], {"role": "assistant", "content": "a < b & 'é' 日本"}, TURNS[2]]
    expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "a < b & 'é' 日本" in expected
    assert renderer(tmp_path / "model", load_prompt_style(smollm2))(turns) == expected


def test_smollm2s_reply_ends_where_the_users_turn_would_begin(smollm2):
    from litgpt.prompts import load_prompt_style
    from litgpt.tokenizer import Tokenizer

    render = renderer(smollm2, load_prompt_style(smollm2))
    assert stops_of_turn(render, Tokenizer(smollm2)) == (frozenset({1, 2}), ())


def test_a_first_turn_is_litgpts_prompt_and_later_ones_follow_plainly(talker_dir):
    from litgpt.prompts import Alpaca, Default
    from litgpt.tokenizer import Tokenizer

    for style in (Default(), Alpaca()):
        render = renderer(talker_dir, style)
        assert render(TURNS[:1]) == style.apply("Hi, I'm Ada.")
    assert renderer(talker_dir, Default())(TURNS) == "Hi, I'm Ada.Hello Ada!\nWho am I?"
    tokenizer = Tokenizer(talker_dir)
    assert stops_of_turn(plain_renderer(Default()), tokenizer) == (frozenset(), ())
    _, texts = stops_of_turn(plain_renderer(Alpaca()), tokenizer)
    assert len(texts) == 1
    assert texts[0].startswith("Below is an instruction")


def test_a_default_style_leaves_text_alone_even_where_a_template_lies(chatml_dir):
    from litgpt.prompts import ChatML, Default

    assert "im_start" not in renderer(chatml_dir, Default())(TURNS)
    assert "im_start" in renderer(chatml_dir, ChatML())(TURNS)


def conversation(context: int, system: str | None = None) -> Conversation:
    from litgpt.prompts import Default

    return Conversation(
        plain_renderer(Default()), lambda text: list(text.encode()), context, system
    )


def test_a_model_that_was_taught_another_style_is_asked_in_that(tmp_path, smollm2):
    """Its tokenizer still carries the template of the model that it was finetuned from."""
    from litgpt.prompts import FreeWilly2, SmolLM2, save_prompt_style

    shutil.copytree(smollm2, tmp_path / "model", ignore=shutil.ignore_patterns("*.pth"))
    save_prompt_style(SmolLM2(), tmp_path / "model")
    assert renderer(tmp_path / "model", SmolLM2())(TURNS).count("<|im_start|>") == 5
    save_prompt_style(FreeWilly2(), tmp_path / "model")
    render = renderer(tmp_path / "model", FreeWilly2())
    system = {"role": "system", "content": "Be brief."}
    text = render([system, *TURNS])
    assert "<|im_start|>" not in text
    assert text.count("### User:") == text.count("### System:\nBe brief.") == 2


def test_a_system_message_without_a_place_is_refused_at_once():
    from litgpt.prompts import Default

    render = plain_renderer(Default())
    with pytest.raises(UserError, match="Default has no place for a system message"):
        Conversation(render, lambda text: list(text.encode()), 60, sys_prompt="Be brief.")


def test_what_outgrows_the_context_is_dropped_from_its_start():
    talk = conversation(context=60)
    for number in range(4):
        ids, dropped = talk.ask(f"question {number}?", max_new_tokens=10)
        talk.answer(f"answer {number}.")
        assert len(ids) + 10 <= 60
        assert dropped == (number == 2 or number == 3)
    assert bytes(ids) == b"question 2?answer 2.\nquestion 3?"


def test_a_question_that_never_fits_is_refused_and_forgotten():
    talk = conversation(context=60)
    talk.ask("one?", max_new_tokens=10)
    talk.answer("1")
    with pytest.raises(UserError, match=r"55 tokens.*at most 5 new"):
        talk.ask("x" * 55, max_new_tokens=10)
    with pytest.raises(UserError, match=r"70 tokens.*60 at most"):
        talk.ask("x" * 70, max_new_tokens=10)
    assert bytes(talk.ask("two?", max_new_tokens=10)[0]) == b"one?1\ntwo?"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ' ~ messages[0].content) }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system prompts here') }}",
        "{% for m in %}",
    ],
)
def test_a_strangers_template_can_call_nothing(tmp_path, chatml_dir, template):
    from litgpt.prompts import ChatML

    directory = tmp_path / "model"
    shutil.copytree(chatml_dir, directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    touched = tmp_path / "touched"
    with pytest.raises(UserError, match="chat template"):
        renderer(directory, ChatML())([{"role": "user", "content": str(touched)}])
    assert not touched.exists()
