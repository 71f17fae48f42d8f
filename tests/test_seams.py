"""The seams: each signature is the installed LitGPT's, and a LitGPT that differs is refused."""

import inspect
import types
from dataclasses import fields, is_dataclass

import litgpt.config
import litgpt.prompts
import pytest

from phi_lit import __version__, seam_table, seams
from phi_lit.errors import UserError
from phi_lit.registry import MODELS
from phi_lit.seam_table import SEAMS, Seam
from phi_lit.seams import apply_seams, signature_of, stock


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_signature_is_that_of_the_installed_litgpt(seam):
    assert signature_of(stock(seam.name)) == seam.signature
    assert seam.why


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_stock_is_litgpts_own_and_ours_is_in_its_place(seam):
    original = stock(seam.name)
    module = __import__(seam.module, fromlist=["x"])
    now = seams._original(seams._find(module, seam)[2])
    replacement = seams._load(seam.replacement)
    if seam.signature == seam_table.ABSENT:
        assert original is None
        assert now is replacement
    elif seam.signature in ("list", "dict") and callable(replacement):
        assert now == {**original, **replacement(original)} != original
    elif seam.signature in ("list", "dict"):
        assert len(now) == len(original) + len(MODELS)
    else:
        mended_twice = seam.replacement == "phi_lit.mends:load_weights"
        theirs = "phi_lit.tensors" if mended_twice else ("litgpt.", "lightning.")
        assert original.__module__.startswith(theirs)
        assert (now.__wrapped__ is original) if seam.wraps else (now is replacement)


def test_litgpts_commands_are_those_we_pass_through():
    from litgpt.parser_config import parser_commands

    assert list(seam_table.LITGPT_COMMANDS) == parser_commands()


def test_litgpts_models_are_untouched():
    before = stock("litgpt.config.name_to_config")
    assert not set(before) & set(MODELS)
    assert {name: litgpt.config.name_to_config[name] for name in before} == before
    assert litgpt.config.configs[: len(before)] == stock("litgpt.config.configs")


@pytest.mark.parametrize("name", ["litgpt.pretrain.setup", "litgpt.finetune.full.setup"])
def test_our_setup_keeps_litgpts_parameters_in_order_with_their_defaults(name):
    theirs = inspect.signature(stock(name)).parameters
    seam = next(seam for seam in SEAMS if seam.name == name)
    ours = inspect.signature(seams._load(seam.replacement)).parameters
    assert [parameter for parameter in ours if parameter in theirs] == list(theirs)
    for parameter in theirs:
        default, stocks = ours[parameter].default, theirs[parameter].default
        if is_dataclass(stocks):
            for field in fields(stocks):
                assert getattr(default, field.name) == getattr(stocks, field.name)
        else:
            assert default == stocks


def _module(**attributes):
    module = types.ModuleType("litgpt.somewhere")
    vars(module).update(attributes)
    return module


def _seam(attribute, signature, replacement="phi_lit.names:prompt_style_of_model"):
    return Seam("litgpt.somewhere", attribute, signature, replacement, "for this test")


def test_a_changed_signature_is_refused_by_a_sentence_with_both_versions():
    def answer(question, *, style=None):
        return question

    module = _module(answer=answer)
    seam = _seam("answer", "question")
    with pytest.raises(UserError) as caught:
        apply_seams(module, (seam,))
    message = str(caught.value)
    assert f"phi_lit {__version__} was written against litgpt 0.5.13" in message
    assert "litgpt 0.5.13 is installed: litgpt.somewhere.answer" in message
    assert "(question, style=) where (question) was expected" in message
    assert "\n" not in message
    assert module.answer is answer


def test_a_missing_attribute_is_refused_and_nothing_is_replaced():
    def kept(model_name):
        return model_name

    module = _module(kept=kept)
    with pytest.raises(UserError, match=r"litgpt\.somewhere\.gone is missing"):
        apply_seams(module, (_seam("kept", "model_name"), _seam("gone", "x")))
    assert module.kept is kept


def test_a_model_name_that_litgpt_takes_for_itself_is_refused():
    module = _module(names={"phi-1": {"name": "phi-1", "n_layer": 3}})
    with pytest.raises(UserError, match="has its own phi-1"):
        apply_seams(module, (_seam("names", "dict", "phi_lit.registry:MODELS"),))
    assert module.names == {"phi-1": {"name": "phi-1", "n_layer": 3}}


def test_applying_twice_changes_nothing():
    before = list(litgpt.config.configs)
    apply_seams(litgpt.config)
    assert litgpt.config.configs == before


def test_signature_says_kinds_and_defaults_but_not_their_values():
    def function(a, b=1, *rest, c, d=None, **more):
        pass

    assert signature_of(function) == "a, b=, *rest, c, d=, **more"
    assert signature_of({}) == "dict"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("phi1-nanoo", "'phi1-nano'"),
        ("Phi1-Small", "'phi1-small'"),
        ("microsoft/phi1", "'microsoft/phi-1'"),
        ("pythia-14mm", "'pythia-14m'"),
    ],
)
def test_an_unknown_model_name_is_answered_with_near_ones(typed, offered):
    with pytest.raises(ValueError, match="is not a supported config name") as caught:
        litgpt.config.Config.from_name(typed)
    assert isinstance(caught.value, UserError)
    assert offered in str(caught.value)


def test_from_name_keeps_the_class_it_is_called_on_and_its_overrides():
    from litgpt.lora import Config as LoraConfig

    config = LoraConfig.from_name("phi1-test", n_layer=3, lora_r=2)
    assert type(config) is LoraConfig
    assert (config.n_layer, config.lora_r, config.n_embd) == (3, 2, 64)


@pytest.mark.parametrize("name", ["phi-1_5", "phi-2", "Phi-3-mini-4k-instruct", "pythia-14m"])
def test_prompt_styles_of_litgpts_models_are_litgpts(name):
    theirs = stock("litgpt.prompts.model_name_to_prompt_style")(name)
    assert type(litgpt.prompts.model_name_to_prompt_style(name)) is type(theirs)
