"""Turns into one prompt: the model's own chat template, or plain text where it has none.

A template comes with a checkpoint, perhaps a stranger's: it is rendered in jinja's sandbox, where
it can call nothing.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi_lit.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Environment
    from litgpt.prompts import PromptStyle
    from litgpt.tokenizer import Tokenizer

Message = dict[str, str]
"""`role` (system, user, assistant) and `content`."""

Render = Callable[[Sequence[Message]], str]
"""From messages, the last one a user's, to the text that the model continues."""


def renderer(checkpoint_dir: Path, style: "PromptStyle") -> Render:
    """Return how a checkpoint writes down a conversation.

    Its own chat template (in tokenizer_config.json or chat_template.jinja) is used, unless the
    model was finetuned to another prompt style than the one that it came with.

    Raises:
        UserError: the template is broken.
    """
    template = chat_template(checkpoint_dir)
    if template is None or was_taught(checkpoint_dir, style):
        return plain_renderer(style)
    return template_renderer(checkpoint_dir, template)


def was_taught(checkpoint_dir: Path, style: "PromptStyle") -> bool:
    """Tell whether a model was finetuned to a prompt style that its chat template doesn't write.

    Default, which leaves text as it is, is always meant: a base model comes with none.
    """
    from litgpt.config import Config
    from litgpt.prompts import Default, PromptStyle, has_prompt_style

    if type(style) is Default:
        return True
    if not has_prompt_style(checkpoint_dir):
        return False
    came_with = PromptStyle.from_config(Config.from_file(checkpoint_dir / "model_config.yaml"))
    template = chat_template(checkpoint_dir)
    if template is None or type(style) is type(came_with):
        return False
    system, question = ({"role": r, "content": r * 3} for r in ("system", "user"))
    render = template_renderer(checkpoint_dir, template)
    try:
        with_system = (
            render([system, question]),
            style.apply("useruseruser", sys_prompt="system" * 3),
        )
        alone = render([question]), style.apply("useruseruser")
    except UserError:  # it refuses a system message, or anything: whoever uses it will be told
        return False
    return with_system[0].strip() != with_system[1].strip() and alone[1].strip() not in alone[0]


def chat_template(checkpoint_dir: Path) -> str | None:
    """Return the text of a checkpoint's chat template, or None."""
    own_file = checkpoint_dir / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = _settings(checkpoint_dir).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _settings(checkpoint_dir: Path) -> dict[str, Any]:
    path = checkpoint_dir / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def template_renderer(checkpoint_dir: Path, template: str) -> Render:
    """Return a renderer that fills in a jinja template, as transformers does.

    Raises:
        UserError: it is no template; when rendering: it refuses these messages.
    """
    from jinja2 import TemplateError

    environment = _environment()
    settings = _settings(checkpoint_dir)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: _content(settings[name]) for name in names if settings.get(name)}
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise UserError(f"{checkpoint_dir}: its chat template is broken ({error}).") from error

    def render(messages: Sequence[Message]) -> str:
        try:
            return compiled.render(messages=list(messages), add_generation_prompt=True, **special)
        except Exception as error:  # whatever a stranger's template does wrong
            raise UserError(f"the chat template refuses these messages: {error}") from error

    return render


def _environment() -> "Environment":
    """Return jinja's sandbox with what transformers gives a chat template, no more."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it is no more."""

        tags = {"generation"}  # noqa: RUF012 - jinja reads it from the class

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    def as_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)  # jinja's own is for HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def plain_renderer(style: "PromptStyle") -> Render:
    """Return a renderer that writes each turn in LitGPT's style, one after the other.

    Every question is put as LitGPT puts it, with the system message where the style has a place.

    Raises:
        UserError (when rendering): there is a system message, and the style has no place for it.
    """

    def render(messages: Sequence[Message]) -> str:
        system = "\n".join(m["content"] for m in messages if m["role"] == "system") or None
        text = ""
        for message in messages:
            if message["role"] == "assistant":
                text += f"{message['content']}\n"
            elif message["role"] != "system":
                asked = style.apply(message["content"], sys_prompt=system)
                if system and system not in asked:
                    raise UserError(
                        f"this model's prompt style {type(style).__name__} has no place for a "
                        "system message; leave it out"
                    )
                text += asked
        return text

    return render


def stops_of_turn(render: Render, tokenizer: "Tokenizer") -> tuple[frozenset[int], tuple[str, ...]]:
    """Return what ends a reply because it begins the user's turn: special tokens, or a string.

    Found by writing down a conversation and looking at what stands between a reply and the next
    user's words: `<|im_end|>\\n<|im_start|>user\\n`, or `### Instruction:`, or only white space.
    """
    question, answer, next_question = "Q1Q1", "A2A2", "Q3Q3"
    text = render(
        [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": next_question},
        ]
    )
    between = text.rpartition(answer)[2].partition(next_question)[0]
    if not between.strip():
        return frozenset(), ()
    ids = tokenizer.encode(between, bos=False).tolist()
    special = frozenset(i for i in ids if i in _special_ids(tokenizer))
    if special:
        return special, ()
    return frozenset(), (between.strip().splitlines()[0],)


def _special_ids(tokenizer: "Tokenizer") -> set[int]:
    if tokenizer.backend != "huggingface":
        return {i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None}
    added = tokenizer.processor.get_added_tokens_decoder()
    return {i for i, token in added.items() if token.special}


class Conversation:
    """The turns so far, and the prompt that they make within a model's context.

    Args:
        render: from messages to text.
        encode: from text to ids.
        context: the most tokens that the model attends to.
        sys_prompt: stays, whatever is dropped.
    """

    def __init__(
        self,
        render: Render,
        encode: Callable[[str], list[int]],
        context: int,
        sys_prompt: str | None = None,
    ) -> None:
        self.turns: list[Message] = []
        self._render, self._encode, self._context = render, encode, context
        self._system = [{"role": "system", "content": sys_prompt}] if sys_prompt else []
        if self._system:
            render([*self._system, {"role": "user", "content": "a"}])  # or refuse it at once

    def ask(self, question: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Add a question; return the prompt's ids and how many of the oldest turns were dropped.

        A turn is a question with its reply. The oldest go until the prompt and `max_new_tokens`
        fit into the context.

        Raises:
            UserError: the question does not fit even alone; it is not added then.
        """
        asked = {"role": "user", "content": question}
        for dropped in range(0, len(self.turns) // 2 + 1):
            kept = self.turns[2 * dropped :]
            ids = self._encode(self._render([*self._system, *kept, asked]))
            if len(ids) + max_new_tokens <= self._context:
                self.turns = [*kept, asked]
                return ids, dropped
        from phi_lit.checks import fault_of_length

        raise UserError(f"{fault_of_length(len(ids), max_new_tokens, self._context)}.")

    def answer(self, text: str) -> None:
        """Add the reply to the last question (what there is of it, if it was interrupted)."""
        self.turns.append({"role": "assistant", "content": text})
