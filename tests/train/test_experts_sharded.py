"""Sharded experts, ranks that visit different ones: nobody waits, and gradients are averaged."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from litgpt import GPT, Config
from litgpt.model import Block
from ranks import on_ranks


def built(rank: int) -> GPT:
    """A model whose router sends every token to experts of the rank alone."""
    torch.manual_seed(0)
    gpt = GPT(Config.from_name("phi1-test-moe"))
    for block in gpt.transformer.h:
        block.mlp.gate.selection_bias[2 * rank : 2 * rank + 2] = 10.0
    return gpt


def rows(rank: int) -> torch.Tensor:
    return torch.arange(40).view(2, 20) * (rank + 3) % 512


def sharded(path: Path) -> None:
    """On each rank: shard, run, and let rank 0 save the gathered gradients."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="env://", rank=rank(), world_size=2)
    gpt = built(rank())
    for module in gpt.modules():
        if isinstance(module, Block):
            fully_shard(module)
    fully_shard(gpt)
    gpt(rows(rank())).square().mean().backward()
    loads = [block.mlp.routing.load_E.tolist() for block in gpt.transformer.h]
    assert all((load[2 * rank()] > 0) and (load[2 - 2 * rank()] == 0) for load in loads)
    whole = {name: p.grad.full_tensor() for name, p in gpt.named_parameters()}
    if rank() == 0:
        torch.save(whole, path)
    dist.destroy_process_group()


def rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def test_ranks_that_visit_different_experts_do_not_hang_and_average(
    tmp_path: Path, one_thread: None
) -> None:
    path = tmp_path / "gradients.pth"
    said = on_ranks(lambda: sharded(path), tmp_path / "said")
    assert [code for code, _ in said] == [0, 0], said
    found = torch.load(path)
    single = []
    for number in range(2):
        gpt = built(number)
        gpt(rows(number)).square().mean().backward()
        single.append({name: parameter.grad for name, parameter in gpt.named_parameters()})
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, (single[0][name] + single[1][name]) / 2)
