"""How the work is spread over processes, and in which number formats: Fabric's strategies by key.

Sharding is FSDP2 (`fully_shard` per block) through Fabric's ModelParallelStrategy, the one path
that also runs on CPU processes over gloo and so is tested everywhere. FSDP1 stays for fp16 with a
loss scale on GPU, which FSDP2's strategy refuses. DeepSpeed's sharding is in `deepspeed.py`.
"""

from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.fabric.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from litgpt.model import Block
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
"""What `precision` can be; fp16 needs a GPU."""

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: rank 0 may be preparing data or writing a checkpoint."""


def check_precision(precision: str, *, device: str, strategy: str) -> list[str]:
    """Return what is wrong with a precision on a device ("cpu" or "cuda"), a sentence each."""
    if precision not in PRECISIONS:
        return [f"precision is {precision!r}; it can be {', '.join(PRECISIONS)}"]
    if precision == "16-mixed" and device == "cpu":
        return ["precision 16-mixed needs a GPU; on this CPU use bf16-mixed or 32-true"]
    if precision.startswith("bf16") and device == "cuda" and not torch.cuda.is_bf16_supported():
        return [f"this GPU has no bf16; use 16-mixed or 32-true instead of {precision}"]
    return []


def check_strategy(
    strategy: str, *, world: int, device: str, precision: str, cpu_offload: bool
) -> list[str]:
    """Return what is wrong with a strategy on this many processes, a sentence each."""
    faults = []
    if cpu_offload and strategy not in ("fsdp", "deepspeed"):
        faults.append(f"cpu_offload needs strategy fsdp or deepspeed, not {strategy}")
    if cpu_offload and device == "cpu":
        faults.append("cpu_offload needs a GPU to offload from")
    return faults


def make_strategy(
    strategy: str,
    *,
    sharding: str,
    cpu_offload: bool,
    precision: str,
    devices: int,
    num_nodes: int,
    checkpointing: str = "none",
) -> str | Strategy:
    """Return the Fabric strategy for a key.

    Args:
        strategy: "auto" (one process: none; several: fsdp), "ddp", "fsdp" or "deepspeed".
        sharding: "full" (parameters, gradients, optimizer state), "grad_op" (parameters stay
            gathered between forward and backward), "hybrid" (full in a node, copies across nodes).
        cpu_offload: keep sharded parameters and optimizer state in host memory.
        precision: one of `PRECISIONS`.
        devices: processes per node.
        num_nodes: nodes.
        checkpointing: which activations are made again.
    """
    world = devices * num_nodes
    if strategy == "auto":
        strategy = "fsdp" if world > 1 else "single"
    if strategy == "ddp" and world > 1:
        return DDPStrategy(timeout=TIMEOUT)
    if strategy == "fsdp" and (world > 1 or cpu_offload):
        if precision == "16-mixed":
            return _fsdp1(sharding, cpu_offload)
        shard = partial(
            shard_blocks, sharding=sharding, cpu_offload=cpu_offload, num_nodes=num_nodes,
            half=torch.bfloat16 if precision == "bf16-mixed" else None,
        )  # fmt: skip
        return ModelParallelStrategy(
            parallelize_fn=shard,
            data_parallel_size=world,
            tensor_parallel_size=1,
            # Offloaded gradients are on the CPU when their norm is summed over the ranks.
            process_group_backend="cpu:gloo,cuda:nccl" if cpu_offload else None,
            timeout=TIMEOUT,
        )
    if strategy == "deepspeed":
        from phi_lit.train.deepspeed import ZeroStrategy, config_of

        config = config_of(
            sharding=sharding, cpu_offload=cpu_offload, precision=precision,
            checkpointing=checkpointing,
        )  # fmt: skip
        return ZeroStrategy(config, timeout=TIMEOUT)
    return "auto"


def shard_blocks(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    sharding: str,
    cpu_offload: bool,
    num_nodes: int,
    half: torch.dtype | None = None,
) -> nn.Module:
    """Shard each transformer block, then what is left at the root (embedding, head, last norm).

    Args:
        model: changed in place.
        mesh: Fabric's, with the dimension "data_parallel".
        sharding: as in `make_strategy`.
        cpu_offload: keep the shards in host memory.
        num_nodes: nodes, for hybrid sharding.
        half: gather the linear layers of blocks in this type, the one that autocast multiplies in:
            half of the bytes, and no copies kept beside them. Gradients are summed in float32.
            A block that is compiled and checkpointed stays as it is: norms that are gathered
            apart would cut it in two, which the compiler cannot do inside a checkpoint.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    data_mesh = mesh["data_parallel"]
    if sharding == "hybrid":
        per_node = data_mesh.size() // num_nodes
        data_mesh = init_device_mesh(
            mesh.device_type, (num_nodes, per_node), mesh_dim_names=("replicate", "shard")
        )
    options: dict[str, Any] = {"mesh": data_mesh}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        of_block = {**options, "reshard_after_forward": sharding != "grad_op"}
        uncut = block._compiled_call_impl is not None and hasattr(block, "checkpointing")
        if half is not None and not uncut:
            for module in _exact_parts(block):
                fully_shard(module, **of_block)
            of_block["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        fully_shard(block, **of_block)
    # The root is needed again at once in the backward pass: gathering it twice would be waste.
    return fully_shard(model, reshard_after_forward=False, **options)


def _exact_parts(block: nn.Module) -> list[nn.Module]:
    """Return what autocast leaves in float32, inner modules first: norms, stacked experts."""
    return [
        module
        for module in reversed(list(block.modules()))
        if not isinstance(module, nn.Linear) and any(True for _ in module.parameters(recurse=False))
    ]


def _fsdp1(sharding: str, cpu_offload: bool) -> FSDPStrategy:
    from torch.distributed.fsdp import MixedPrecision

    kinds = {"full": "FULL_SHARD", "grad_op": "SHARD_GRAD_OP", "hybrid": "HYBRID_SHARD"}
    return FSDPStrategy(
        auto_wrap_policy={Block},
        sharding_strategy=kinds[sharding],  # type: ignore[arg-type]
        cpu_offload=cpu_offload,
        # Fabric's default would also put the rotary tables and the summed gradients into fp16.
        mixed_precision=MixedPrecision(
            param_dtype=torch.float16, reduce_dtype=torch.float32, buffer_dtype=torch.float32
        ),
        state_dict_type="full",
        limit_all_gathers=True,
        use_orig_params=True,
        timeout=TIMEOUT,
    )
