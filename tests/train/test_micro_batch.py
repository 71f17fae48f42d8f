"""`micro_batch_size: auto` and running out of memory: searched, tried without a trace, told."""

from types import SimpleNamespace

import pytest
import torch
from lightning import Fabric
from litgpt.config import Config
from litgpt.model import GPT

from phi_lit.errors import UserError
from phi_lit.registry import MODELS
from phi_lit.train.microbatch import largest_that_works, out_of_memory, runs
from phi_lit.train.model import LossModel


@pytest.mark.parametrize(
    ("works", "guess", "found", "tried"),
    [
        ({1, 2, 4, 8}, 4, 8, [4, 8]),
        ({1, 2}, 8, 2, [8, 4, 2]),
        ({1, 2, 4}, 4, 4, [4, 8]),
        (set(), 2, 0, [2, 1]),
    ],
)
def test_the_search_for_a_micro_batch_starts_at_the_prediction(works, guess, found, tried) -> None:
    seen: list[int] = []

    def fits(rows: int) -> bool:
        seen.append(rows)
        return rows in works

    assert largest_that_works([1, 2, 4, 8], guess, fits) == found
    assert seen == tried


def test_trying_a_micro_batch_leaves_no_trace_and_survives_running_out() -> None:
    class RunsOut(LossModel):
        def forward(self, idx, targets, *more):
            loss = super().forward(idx, targets, *more)
            if len(idx) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return loss

    fabric = Fabric(accelerator="cpu", devices=1)
    module = fabric.setup_module(RunsOut(GPT(Config(**MODELS["phi1-test"]))))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    job = SimpleNamespace(length=64)
    assert [runs(job, None, fabric, module, rows) for rows in (1, 2, 4)] == [True, True, False]
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_running_out_of_a_gpus_memory_is_told_in_one_line() -> None:
    job = SimpleNamespace(config=SimpleNamespace(name="phi-1"))
    with (
        pytest.raises(UserError, match=r"^phi-1: CUDA out of memory.*micro_batch_size") as told,
        out_of_memory(job),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails.")
    assert "\n" not in str(told.value)
