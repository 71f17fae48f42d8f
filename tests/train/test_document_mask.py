"""A packed row is its documents alone: losses, gradients, training, with all that is around."""

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litgpt.finetune.full
import pytest
import torch
import yaml
from jsonargparse import CLI
from litgpt import GPT, Config
from runs import RECIPE, assert_same_to_the_bit, losses, merged, quiet_environment, rows
from torch import Tensor
from torch.nn import functional as F

from phi_lit.errors import UserError
from phi_lit.train.attention import dropout_attention
from phi_lit.train.checkpointing import apply_activation_checkpointing
from phi_lit.train.documents import (
    apply_document_mask,
    choose_kernel,
    forward_within_documents,
    make_mask,
    restarted_positions,
)
from phi_lit.train.dropout import apply_dropout
from phi_lit.train.feed import IGNORE, pair
from phi_lit.train.model import LossModel, compile_blocks
from phi_lit.train.packed import PackedFeed, measure
from phi_lit.train.segments import segment_attention

SMALL = dict(n_layer=2, n_embd=32, n_head=4, block_size=64, padded_vocab_size=64, vocab_size=64)
MODELS = {
    "phi": dict(name="phi-1_5", intermediate_size=64),
    "llama with grouped queries": dict(
        name="Llama-3.2-1B", n_query_groups=2, intermediate_size=64, rope_adjustments=None
    ),
    "mixture of experts": dict(
        name="Mixtral-8x7B-v0.1", n_query_groups=2, n_expert=4, intermediate_size=64
    ),
    "soft-capped, scaled embeddings": dict(
        name="Gemma-2-2b", n_query_groups=2, head_size=8, intermediate_size=64,
        sliding_window_size=None, sliding_window_indices=None,
    ),
}  # fmt: skip
LENGTHS = [[10, 20, 34], [64], [1, 1, 30, 32], [63, 1]]
"""Documents of four rows of 64 positions."""


def documents_of(lengths: list[list[int]]) -> Tensor:
    """Which document of its row a position belongs to."""
    numbers = [[number for number, n in enumerate(row) for _ in range(n)] for row in lengths]
    return torch.tensor(numbers, dtype=torch.int32)


def model(kind: str = "phi", dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> GPT:
    torch.manual_seed(1)
    gpt = GPT(Config.from_name(**{**SMALL, **MODELS[kind]})).to(dtype)
    apply_dropout(gpt, attention=dropout, residual=dropout)
    apply_document_mask(gpt)
    return gpt


def batch(masked: float = 0.4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 64, (4, 64), generator=generator)
    targets = torch.randint(0, 64, (4, 64), generator=generator)
    targets[torch.rand(4, 64, generator=generator) < masked] = IGNORE
    return ids, targets


def gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def alone(gpt: GPT) -> dict[str, Tensor]:
    """The token-weighted loss of every document by itself, through LitGPT's own forward."""
    ids, targets = batch()
    total, count = torch.zeros((), dtype=torch.float64), int((targets != IGNORE).sum())
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            logits = gpt(ids[row : row + 1, part])[0].double()
            total = total + F.cross_entropy(
                logits, targets[row, part], ignore_index=IGNORE, reduction="sum"
            )
            start += length
    return gradients(gpt, total / count)


def packed(gpt: GPT) -> dict[str, Tensor]:
    ids, targets = batch()
    loss_model = LossModel(gpt)
    found = gradients(loss_model, loss_model(ids, targets, documents=documents_of(LENGTHS)))
    return {name.removeprefix("gpt."): value for name, value in found.items()}


# ----------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    # LitGPT's RMSNorm rounds to float32 whatever it is given, phi's LayerNorm does not.
    [("phi", torch.float64, 1e-12), *((kind, torch.float32, 1e-5) for kind in MODELS)],
)
def test_a_packed_batch_has_the_loss_and_gradients_of_its_documents_alone(kind, dtype, tolerance):
    ours, theirs = packed(model(kind, dtype)), alone(model(kind, dtype))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= tolerance, name


@pytest.mark.parametrize("kernel", ["segments", "mask", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_kernel_sees_the_same(kernel):
    gpt, (ids, _) = model(), batch()
    with torch.no_grad():
        whole = forward_within_documents(gpt, ids, documents_of(LENGTHS), kernel)
        expected = [
            torch.cat([gpt(piece) for piece in row[None].split(lengths, dim=1)], dim=1)
            for row, lengths in zip(ids, LENGTHS, strict=True)
        ]
    torch.testing.assert_close(whole, torch.cat(expected), rtol=0, atol=1e-12)


def test_flash_attn_is_asked_as_it_is_documented(monkeypatch):
    """Its function is played by PyTorch's attention, document by document, on its own layout."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False,
    ):  # fmt: skip
        assert q.shape == (4 * 64, 4, 8)
        assert cu_seqlens_q.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k, dropout_p, causal) == (64, 64, 0.0, True)
        sizes = cu_seqlens_q.diff().tolist()
        parts = zip(*(x.transpose(0, 1).split(sizes, dim=1) for x in (q, k, v)), strict=True)
        done = [
            F.scaled_dot_product_attention(*part, is_causal=True, scale=softmax_scale)
            for part in parts
        ]
        return torch.cat(done, dim=1).transpose(0, 1)

    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    gpt, (ids, _) = model(), batch()
    documents = documents_of(LENGTHS)
    assert make_mask(gpt, documents, "flash").starts.tolist() == [
        0, 10, 30, 64, 128, 129, 130, 160, 192, 255, 256,
    ]  # fmt: skip
    ours = forward_within_documents(gpt, ids, documents, "flash")
    torch.testing.assert_close(ours, forward_within_documents(gpt, ids, documents, "mask"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["flash", "flex", "mask"])
def test_kernels_on_a_gpu_agree_with_the_documents_alone(kernel):
    if kernel == "flash":
        pytest.importorskip("flash_attn")
    ids, _ = batch()
    dtype = torch.bfloat16 if kernel == "flash" else torch.float32
    gpt = model(dtype=torch.float32).cuda().to(dtype)
    ids, documents = ids.cuda(), documents_of(LENGTHS).cuda()
    ours = forward_within_documents(gpt, ids, documents, kernel)
    theirs = forward_within_documents(gpt.cpu().float(), ids.cpu(), documents.cpu(), "segments")
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours.cpu().float(), theirs, rtol=0, atol=tolerance)


def test_one_document_a_row_is_litgpts_forward_to_the_bit():
    gpt, (ids, _) = model(dtype=torch.float32), batch()
    one = torch.zeros(4, 64, dtype=torch.int32)
    assert torch.equal(forward_within_documents(gpt, ids, one), gpt(ids))


def test_positions_begin_anew_and_it_makes_no_difference_but_rounding():
    documents = documents_of([[2, 3, 1], [6]])
    assert restarted_positions(documents).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    gpt, (ids, _) = model(), batch()
    documents = documents_of(LENGTHS)
    x, mask = gpt.transformer.wte(ids), make_mask(gpt, documents, "segments")
    for block in gpt.transformer.h:  # positions of the whole row
        x = block(x, gpt.cos[None], gpt.sin[None], mask)
    going_on = gpt.lm_head(gpt.transformer.ln_f(x))
    torch.testing.assert_close(
        forward_within_documents(gpt, ids, documents), going_on, rtol=0, atol=1e-6
    )


def test_in_a_flat_array_the_end_of_text_begins_the_next_document():
    found = pair(torch.tensor([[5, 6, 0, 7, 8, 0, 0, 9, 4]]), begin_id=0)
    assert found.inputs.tolist() == [[5, 6, 0, 7, 8, 0, 0, 9]]
    assert found.targets.tolist() == [[6, 0, 7, 8, 0, 0, 9, 4]], "every target stays one"
    assert found.documents.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3]]
    assert found.documents.dtype == torch.int32


def test_models_that_a_mask_does_not_know_are_refused():
    sliding = Config.from_name("Gemma-2-2b", **SMALL, n_query_groups=2, intermediate_size=64)
    with pytest.raises(UserError, match="attends within sliding windows"):
        apply_document_mask(GPT(sliding))
    from litgpt.adapter import GPT as AdapterGPT
    from litgpt.adapter import Config as AdapterConfig

    with pytest.raises(UserError, match="does not know models of the kind GPT"):
        apply_document_mask(AdapterGPT(AdapterConfig.from_name("phi1-test")))
    assert choose_kernel(model("soft-capped, scaled embeddings"), "cpu") == "mask"


# ------------------------------------------------------------------------------ with what is around


def test_dropout_drops_within_each_document_from_its_own_seed():
    """The slow double: `dropout_attention` on every document by itself, outputs and gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 12, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    seed, lengths = torch.tensor([7]), [[5, 7], [12]]
    out, _ = segment_attention(q, k, v, documents_of(lengths), seed, 0.3, 0.25)
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), (q, k, v))
    expected, number = [], 0
    for row, sizes in enumerate(lengths):
        pieces = zip(*(x[row : row + 1].split(sizes, dim=2) for x in (q, k, v)), strict=True)
        done = []
        for piece in pieces:
            done.append(dropout_attention(*piece, seed + number, 0.3, 0.25))
            number += 1
        expected.append(torch.cat(done, dim=2))
    slow = torch.cat(expected)
    torch.testing.assert_close(out, slow, rtol=0, atol=1e-12)
    theirs = torch.autograd.grad((slow * weights).sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_operation_keeps_pytorchs_contract_for_custom_operations():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 6, 4, requires_grad=True) for _ in range(3))
    documents, seed = documents_of([[2, 4], [6]]), torch.tensor([3])
    for dropout in (0.0, 0.2):
        torch.library.opcheck(segment_attention, (q, k, v, documents, seed, dropout, 0.5))


def with_checkpointing(mode: Any, dropout: float = 0.2) -> dict[str, Tensor]:
    gpt = model(dtype=torch.float32, dropout=dropout)
    apply_activation_checkpointing(gpt, mode)
    torch.manual_seed(3)
    return packed(gpt)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit_with_dropout_on(one_thread, mode):
    ours, plain = with_checkpointing(mode), with_checkpointing("none")
    assert all(torch.equal(ours[name], value) for name, value in plain.items())


def test_compiled_blocks_take_the_mask_in_one_graph():
    torch._dynamo.reset()
    eager, compiled = model(dtype=torch.float32), model(dtype=torch.float32)
    compile_blocks(compiled, fullgraph=True)
    torch.testing.assert_close(packed(compiled), packed(eager), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------- packed training


def examples_of(n: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"count to {k % 7}", "input": "", "output": "word " * (1 + k % 7)}
        for k in range(n)
    ]


@pytest.fixture
def finetune(
    corpus: Path, tiny_checkpoint_dir: Path, tmp_path: Path, one_thread: None
) -> Callable[..., Path]:
    """Runs `litgpt finetune_full` on examples; returns the output directory."""
    path = tmp_path / "examples.json"
    path.write_text(json.dumps(examples_of(60)))
    data = {
        "class_path": "litgpt.data.JSON",
        "init_args": {
            "json_path": str(path), "val_split_fraction": 0.2, "num_workers": 0,
            "mask_prompt": True, "prompt_style": {"class_path": "litgpt.prompts.Default"},
        },
    }  # fmt: skip

    def arguments(out_dir: Path, **changes: Any) -> dict[str, Any]:
        base = {key: value for key, value in RECIPE.items() if key != "model_name"}
        base |= {"checkpoint_dir": str(tiny_checkpoint_dir), "out_dir": str(out_dir), "devices": 1}
        train = {"pack": True, "micro_batch_size": 2, "max_steps": 6, "compile": "off"}
        return merged(merged(base, {"data": data, "train": train}), changes)

    def run(out_dir: Path, **changes: Any) -> Path:
        config = out_dir.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(arguments(out_dir, **changes)))
        CLI(litgpt.finetune.full.setup, args=["--config", str(config)])
        return out_dir

    run.arguments = arguments  # type: ignore[attr-defined]
    return run


PLAIN = {"attention_dropout": 0.0, "residual_dropout": 0.0}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}


def test_an_epoch_packed_is_the_epoch_unpacked(tmp_path, finetune, capsys):
    """One step over the whole data set: the same loss and weights, from a third of the rows."""
    whole = finetune(
        tmp_path / "whole", optimizer=SGD,
        train={**PLAIN, "pack": None, "max_steps": 1, "global_batch_size": 48},
    )  # fmt: skip
    capsys.readouterr()
    probe = finetune(tmp_path / "probe", optimizer=SGD, train={**PLAIN, "max_steps": 1})
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("packed 48 examples into"))
    n_rows = int(line.split()[4])
    assert n_rows <= 30
    assert "of the positions useful" in line
    assert probe.is_dir()
    packed_run = finetune(
        tmp_path / "packed", optimizer=SGD,
        train={**PLAIN, "max_steps": 1, "global_batch_size": n_rows, "micro_batch_size": 1},
    )  # fmt: skip
    assert losses(packed_run) == pytest.approx(losses(whole), abs=1e-5)
    one, other = (
        torch.load(out / "final" / "lit_model.pth", weights_only=True)["model"]
        for out in (whole, packed_run)
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)


def test_packed_rows_are_the_same_in_micro_batches_of_any_size(tmp_path, finetune):
    found = {
        micro: losses(
            finetune(
                tmp_path / f"m{micro}", optimizer=SGD, train={**PLAIN, "micro_batch_size": micro}
            )
        )
        for micro in (8, 2, 1)
    }
    assert found[2] == pytest.approx(found[8], abs=1e-5)
    assert found[1] == pytest.approx(found[8], abs=1e-5)


def test_a_packed_run_resumes_to_the_bit_with_dropout_and_refuses_to_be_unpacked(
    tmp_path, finetune
):
    whole = finetune(tmp_path / "whole")
    part = finetune(tmp_path / "part", train={"max_steps": 3, "lr_total_steps": 6})
    with pytest.raises(UserError, match="pack was True and is None"):
        finetune(part, train={"lr_total_steps": 6, "pack": None}, resume="auto")
    finetune(part, train={"lr_total_steps": 6}, resume="auto")
    assert losses(part) == losses(whole)
    assert_same_to_the_bit(part / "latest", whole / "latest")


def test_two_sharded_ranks_train_on_packed_rows_as_one(tmp_path, finetune):
    one = finetune(tmp_path / "one", optimizer=SGD, train={**PLAIN, "max_steps": 2})
    out = tmp_path / "two"
    train = {**PLAIN, "max_steps": 2, "activation_checkpointing": "full"}
    arguments = finetune.arguments(out, optimizer=SGD, devices=2, strategy="fsdp", train=train)
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(arguments))
    done = subprocess.run(
        [Path(sys.executable).with_name("litgpt"), "finetune_full", "--config", config],
        env=quiet_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)


def test_rows_without_a_target_are_counted_and_make_no_nan(tmp_path, finetune):
    rows_of_prompts = [
        {"instruction": "long " * 40 if k % 2 else "short", "input": "", "output": "yes"}
        for k in range(40)
    ]
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(rows_of_prompts))
    data = {"init_args": {"json_path": str(path)}}
    unpacked = finetune(tmp_path / "unpacked", data=data, train={"pack": None})
    counted = [row.get("rows_without_target", 0) for row in rows(unpacked) if "loss" in row]
    assert counted == sorted(counted)
    assert counted[-1] > 10
    assert all(0 < loss < 10 for loss in losses(unpacked))
    packed_run = finetune(tmp_path / "packed", data=data)
    assert not any("rows_without_target" in row for row in rows(packed_run)), "they are left out"


class Items(list):
    """Examples as LitGPT's data sets give them, with nothing known of their lengths."""


def test_packed_rows_as_literal_lists():
    def item(ids: list[int], answer: int) -> dict[str, Tensor]:
        labels = torch.tensor(ids)
        labels[:-answer] = IGNORE
        return {"input_ids": torch.tensor(ids), "labels": labels}

    examples = Items(
        [item([1, 2, 3], 1), item([4, 5, 6, 7], 2), item([8, 9], 0), item([10, 11, 12], 2)]
    )
    examples[2]["labels"][:] = IGNORE
    found = measure(examples, 5)
    assert found.items.tolist() == [0, 1, 3]
    assert found.positions.tolist() == [2, 3, 2]
    assert (found.targets, found.cut) == (5, 0)
    loader = types.SimpleNamespace(dataset=examples)
    feed = PackedFeed(
        loader, micro_batch=2, rank=0, world=1, seed=0, row_length=5, masked=True  # type: ignore[arg-type]
    )  # fmt: skip
    seen = {tuple(tuple(part.tolist()) for part in row) for row in zip(*feed.take(), strict=True)}
    both = {
        ((4, 5, 6, 1, 2), (IGNORE, 6, 7, IGNORE, 3), (0, 0, 0, 1, 1)),
        ((10, 11, 0, 0, 0), (11, 12, IGNORE, IGNORE, IGNORE), (0, 0, 1, 1, 1)),
    }
    swapped = {
        ((4, 5, 6, 10, 11), (IGNORE, 6, 7, 11, 12), (0, 0, 0, 1, 1)),
        ((1, 2, 0, 0, 0), (IGNORE, 3, IGNORE, IGNORE, IGNORE), (0, 0, 1, 1, 1)),
    }
    assert seen in (both, swapped)
    assert feed.position == 2
    assert feed.report() == (
        "packed 3 examples into 2 rows of 5: 1.50 to a row, 70.0% of the positions useful, "
        "50.0% learned; 1 without a target left out"
    )


# -------------------------------------------------------------------------------------- pretraining


def test_pretraining_masks_documents_where_asked_and_not_by_default(tmp_path, train):
    paper = train(tmp_path / "paper", train={**PLAIN, "max_steps": 2})
    masked = train(tmp_path / "masked", train={**PLAIN, "max_steps": 2, "document_mask": True})
    assert losses(masked) != losses(paper)
    assert losses(masked) == pytest.approx(losses(paper), rel=0.05)
    with pytest.raises(UserError, match="document_mask was True and is None"):
        train(masked, train={**PLAIN, "max_steps": 4}, resume="auto")


def test_rows_that_are_full_cannot_be_packed(tmp_path, train):
    with pytest.raises(UserError, match="the rows of CodeTextbook come as they are"):
        train(tmp_path / "out", train={"pack": True})


def test_single_examples_have_no_documents_to_mask(tmp_path, finetune):
    with pytest.raises(UserError, match=r"JSON gives rows of one text each.*train\.pack"):
        finetune(tmp_path / "out", train={"pack": None, "document_mask": True})
