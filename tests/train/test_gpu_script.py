"""The GPU script's toy run: every contestant trains, results are kept, failures end only their own.

What it measures here means nothing; that it runs, and that all sides compute the same loss, does.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from litgpt.config import Config

from phi_lit.registry import MODELS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))  # as when the script is run: it has neighbours
    spec = importlib.util.spec_from_file_location("gpu_script", BENCHMARKS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))


def toy(out, *more):
    return ["--device", "cpu", "--quick", "--out", str(out), "--sizes", "1", "--steps", "1", *more]


def test_every_contestant_runs_and_is_in_the_table(gpu, tmp_path, one_thread):
    results = gpu.main(toy(tmp_path, "--here", "--sections", "speed"))
    measured = {key: value for key, value in results.items() if key.startswith("speed ")}
    assert {value["case"]["side"] for value in measured.values()} == {
        "ours",
        "litgpt",
        "transformers",
    }
    for key, value in measured.items():
        assert "error" not in value, (key, value)
        assert value["results"][0]["tokens_per_second"] > 0
    text = (tmp_path / "results.md").read_text()
    assert all(f"| {key.removeprefix('speed ')} |" in text for key in measured)
    assert f"torch {torch.__version__}" in text


def test_all_sides_compute_the_same_loss(gpu, one_thread):
    from lightning import Fabric
    from litgpt.model import GPT
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_phi
    from one_gpu.cases import Case
    from one_gpu.sides import BUILDERS

    config = Config(**MODELS["phi1-test"])
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    ids = torch.randint(0, 500, (2, 65), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    torch.manual_seed(0)
    weights = {name: torch.randn(p.shape) / 2 for name, p in GPT(config).named_parameters()}
    theirs: dict = {}
    copy_weights_phi(config, theirs, dict(weights))
    losses = {}
    for side, build in BUILDERS.items():
        case = Case(side, "phi1-test", "32-true", compile=False)
        loss_of, module = build(case, config, fabric)
        own = theirs if side == "transformers" else weights
        parameters = dict(module.named_parameters())
        assert len(parameters) == len(own)
        with torch.no_grad():
            for name, value in own.items():  # the wrappers put something before a name
                [parameter] = [p for key, p in parameters.items() if key.endswith(name)]
                parameter.copy_(value)
        losses[side] = loss_of(inputs, targets).item()
    assert abs(losses["ours"] - math.log(512)) > 0.1  # not the loss of a uniform guess
    assert losses == pytest.approx(dict.fromkeys(BUILDERS, losses["ours"]), rel=1e-5)


def test_a_second_run_measures_only_what_is_missing(gpu, tmp_path, one_thread, capsys):
    arguments = toy(tmp_path, "--here", "--sections", "speed", "--only")
    first = gpu.main([*arguments, "ours, bf16-true"])
    capsys.readouterr()
    second = gpu.main([*arguments, "bf16-true"])
    assert second == first
    assert "speed" not in capsys.readouterr().out.partition("# One GPU")[0]


def test_a_measurement_that_fails_or_lasts_too_long_ends_only_itself(gpu, tmp_path):
    options = gpu.parse(toy(tmp_path, "--sections", "speed", "--only", "ours, bf16-true"))
    [(_, measure)] = list(gpu.plan_sections(options))
    assert measure()["results"][0]["tokens_per_second"] > 0  # in a process of its own
    task = {
        "kind": "speed",
        "case": {"side": "nobody", "model": "phi1-test", "precision": "32-true"},
    }
    task |= {"device": "cpu", "sizes": [1], "steps": 1, "accumulate": 1}
    assert "KeyError: 'nobody'" in gpu.measure_apart(task, 60)["error"]
    assert gpu.measure_apart(task, 0.01)["error"] == "cut off after 0 s"


def test_running_out_of_memory_ends_the_growth_with_a_note(gpu, monkeypatch):
    from one_gpu import speed
    from one_gpu.book import best
    from one_gpu.cases import Case

    calls = []

    def measure_size(case, device, rows, steps, accumulate):
        calls.append(rows)
        if rows > 2:
            raise RuntimeError("step failed") from torch.OutOfMemoryError("CUDA out of memory")
        return {"tokens_per_second": 10.0 * rows}

    monkeypatch.setattr(speed, "measure_size", measure_size)
    case = Case("ours", "phi1-test", "32-true")
    results = list(speed.measure_speed(case, "cpu", [1, 2, 4, 8], 1, 1))
    assert calls == [1, 2, 4]
    assert best(results)["micro_batch"] == 2
    assert results[-1] == {"micro_batch": 4, "out_of_memory": True}


def test_results_survive_the_script(gpu, tmp_path):
    book = gpu.Book(tmp_path)
    book.write("kernels", {"results": [{"kernel": "matmul", "tflops": 1.0}]})
    assert "kernels" in gpu.Book(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == book.results
    assert "| matmul | - | 1.0 | - |" in gpu.table(book.results)


def test_kernels_that_are_missing_are_noted(gpu, tmp_path, one_thread):
    results = gpu.main(toy(tmp_path, "--here", "--sections", "kernels"))
    rows = {row["kernel"]: row for row in results["kernels"]["results"]}
    assert rows["head + loss: ours, torch"]["milliseconds"] > 0
    assert "error" in rows["attention: efficient_attention, dropout 0.0"]  # CPUs have none


def test_float8_products_are_near_those_of_bf16(gpu):
    from _float8 import Float8Linear, convert_to_float8_training

    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 128).bfloat16()
    x = torch.randn(2, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 32, 128, dtype=torch.bfloat16)
    exact = layer(x)
    wanted = [exact, *torch.autograd.grad(exact, (x, layer.weight, layer.bias), grad)]
    convert_to_float8_training(layer)
    assert type(layer) is Float8Linear
    y = layer(x)
    found = [y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)]
    for one, other in zip(wanted, found, strict=True):
        # e4m3 has 3 bits after the point, e5m2 two: 1/16 and 1/8 at most, half that on average.
        assert (one - other).norm() < 0.08 * one.norm()


@pytest.mark.slow
def test_the_training_section_trains(gpu, tmp_path):
    result = gpu.main(toy(tmp_path, "--sections", "train"))["train phi1-test"]
    assert "error" not in result, result
    assert result["steps"] == 4
