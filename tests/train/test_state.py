"""The state of a training before its first step: gathering it must not be a step."""

import copy

import torch
from litgpt.config import Config
from litgpt.model import GPT

from phi_lit.registry import MODELS
from phi_lit.train import state
from phi_lit.train.model import LossModel
from phi_lit.train.optim import build_optimizer

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}}


def trained_step(model: LossModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    ids = torch.arange(64).view(2, 32)
    model(ids, ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.state_dict()


def test_saving_before_the_first_step_changes_nothing_that_follows() -> None:
    model = LossModel(GPT(Config(**MODELS["phi1-test"])))
    twin = copy.deepcopy(model)
    [optimizer], [untouched] = build_optimizer(model, ADAMW), build_optimizer(twin, ADAMW)
    model_state, optimizer_state = state.gather(model, [optimizer], whole=True)
    model_state = state.to_host(model_state)  # it holds the living weights
    assert optimizer_state == {"state": {}, "param_groups": []}
    assert not optimizer.state
    first, second = trained_step(model, optimizer), trained_step(twin, untouched)
    assert all(torch.equal(first[name], second[name]) for name in first)

    resumed = LossModel(GPT(Config(**MODELS["phi1-test"])))
    [fresh] = build_optimizer(resumed, ADAMW)
    state.scatter(resumed, [fresh], model_state, optimizer_state)
    assert not fresh.state
    third = trained_step(resumed, fresh)
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert {float(values["step"]) for values in fresh.state.values()} == {1.0}
