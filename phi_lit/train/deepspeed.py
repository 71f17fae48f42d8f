"""`strategy: deepspeed`: ZeRO's sharding of gradients and optimizer state, and of weights if asked.

DeepSpeed takes model and optimizer together, flattens their tensors and has a loop and a checkpoint
format of its own. Here only its sharding is used: our loop decides when gradients are complete and
whether a step is good, and `gather` and `scatter` give the state by parameter name in whole
tensors, as every other strategy's (`state.py`). ZeRO: arXiv 1910.02054.
"""

import math
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.optim import Optimizer

STAGES = {"grad_op": 2, "full": 3}
"""ZeRO's stage by sharding option: gradients and optimizer state, or weights too."""

ELEMENTWISE = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
"""Optimizers of torch.optim that can step flattened tensors, which is all that ZeRO hands them."""


BUCKET, LIVE = 50_000_000, 200_000_000
"""Numbers of gradients that are exchanged at a time, and of weights that stage 3 may hold whole
(DeepSpeed's defaults are ten and five times as many, more than phi-1-small has)."""


def check_deepspeed(*, sharding: str, precision: str, optimizer: type) -> list[str]:
    """Return what DeepSpeed cannot do of what is asked, a sentence each."""
    faults = []
    if find_spec("deepspeed") is None:
        faults.append("strategy deepspeed needs its package: pip install 'phi-lit[deepspeed]'")
    if sharding not in STAGES:
        faults.append(
            f"sharding {sharding} is fsdp's; with deepspeed it can be full (ZeRO 3) or grad_op "
            "(ZeRO 2)"
        )
    if precision == "bf16-true":
        faults.append(
            "deepspeed keeps float32 weights beside bf16 ones, which is not bf16-true; use "
            "precision bf16-mixed, or strategy fsdp"
        )
    module, name = optimizer.__module__.partition(".")[0], optimizer.__name__
    if module != "torch" or name not in ELEMENTWISE:
        faults.append(
            f"deepspeed flattens tensors before the optimizer sees them, so {name} cannot step "
            f"them; use torch.optim's {', '.join(ELEMENTWISE)}, or strategy fsdp"
        )
    return faults


def config_of(
    *, sharding: str, cpu_offload: bool, precision: str, checkpointing: str = "none"
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for our keys."""
    zero: dict[str, Any] = {
        "stage": STAGES[sharding],
        # Its linear function adds the bias in place, to what selective checkpointing has kept.
        "memory_efficient_linear": checkpointing != "selective",
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": LIVE,
        "stage3_max_reuse_distance": LIVE,
    }
    if cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if sharding == "full":
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        # Our loop divides the loss and says which micro-batch is a step's last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
    }
    if precision == "bf16-mixed":
        # No module's weights are "safe" to exchange in bf16: DeepSpeed would sum gradients in it.
        safe: list[str] = []
        config["torch_autocast"] = {
            "enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": safe,
        }  # fmt: skip
    if precision == "16-mixed":  # the loss scale as torch's own
        config["fp16"] = {
            "enabled": True, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1,
        }  # fmt: skip
    return config


class ZeroStrategy(DDPStrategy):
    """Fabric's view of DeepSpeed: processes and devices as DDP's, the rest by its engine.

    Fabric's own DeepSpeedStrategy refuses CPUs, clips out of sight and saves in DeepSpeed's format.
    Its engine also casts: give Fabric the precision 32-true.

    Args:
        config: DeepSpeed's, from `config_of`.
        options: DDPStrategy's.
    """

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.config = config
        self._backward_sync_control = _Boundary()

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> Any:
        """Hand model and optimizer to DeepSpeed, which shards them."""
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if self.root_device.type == "cpu" else "cuda")
        import deepspeed

        deepspeed.utils.logging.logger.setLevel("WARNING")
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # its own calls
        deepspeed.init_distributed(self._get_process_group_backend(), dist_init_required=False)
        [optimizer] = optimizers
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        grouped = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        self._declare_head(module)
        self.engine, zero, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.config, dist_init_required=False
        )
        self.engine.grouped_names = grouped
        if self.engine.fp16_enabled():  # where the loop finds a loss scale
            self.precision.scaler = LossScale(zero)  # type: ignore[attr-defined]
        return self.engine, [zero], scheduler

    def _declare_head(self, module: nn.Module) -> None:
        """Let stage 3 gather the head for the whole forward pass: the loss reads its weight."""
        import deepspeed

        for parameter in module.gpt.lm_head.parameters():  # type: ignore[union-attr]
            deepspeed.zero.register_external_parameter(module, parameter)

    def backward(self, tensor: Tensor, module: nn.Module | None, *_: Any, **__: Any) -> None:
        """Run the backward pass; gradients are averaged and sharded on the way."""
        self.engine.backward(tensor)

    def clip_gradients_norm(self, module: Any, optimizer: Any, max_norm: float, **_: Any) -> Tensor:
        """Have the coming step clip to `max_norm`; returns the norm before."""
        optimizer.clip_grad = 0.0 if math.isinf(max_norm) else max_norm
        if hasattr(optimizer, "_get_norm_groups"):  # stage 3
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(optimizer._get_norm_groups())
        else:
            norm = optimizer.scaled_global_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32) / optimizer.loss_scale
        return torch.where(norm >= 0, norm, torch.inf)  # DeepSpeed calls what is not finite -1

    def optimizer_step(self, optimizer: Any, **_: Any) -> None:
        """Step, and gather the weights that a rank needs."""
        self.engine.step()

    def skip_step(self) -> None:
        """Forget the gradients: at one that is not a number DeepSpeed leaves the step out."""
        from deepspeed.utils import safe_set_full_grad

        parameter = next(p for p in self.engine.module.parameters() if p.requires_grad)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        safe_set_full_grad(parameter, torch.full(shape, torch.nan, device=parameter.device))
        self.engine.step()


class _Boundary(_BackwardSyncControl):
    """Tells DeepSpeed which micro-batch is a step's last; it reduces gradients after each."""

    def no_backward_sync(self, module: Any, enabled: bool) -> AbstractContextManager:
        module.set_gradient_accumulation_boundary(not enabled)
        return nullcontext()


class LossScale:
    """DeepSpeed's fp16 loss scale, as torch's GradScaler is asked and saved."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def get_scale(self) -> float:
        """Return the factor of the loss."""
        return float(self._zero.loss_scale)

    def unscale_(self, optimizer: Any) -> None:
        """Nothing to do: DeepSpeed divides when it steps."""

    def update(self) -> None:
        """Nothing to do: DeepSpeed follows its own steps."""

    def state_dict(self) -> dict[str, Any]:
        """Return its place, plain numbers."""
        return {key: value for key, value in vars(self._zero.loss_scaler).items() if _plain(value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place (one saved under another strategy is left alone: its names differ)."""
        scaler = self._zero.loss_scaler
        vars(scaler).update({key: value for key, value in state.items() if hasattr(scaler, key)})


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float)


# ------------------------------------------------------------------------------------------- state


def is_engine(module: nn.Module) -> bool:
    """Tell whether a module is DeepSpeed's."""
    return type(module).__name__ == "DeepSpeedEngine"


def gather(engine: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (model state, optimizer state) in whole tensors, on rank 0; all ranks must call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    keep = engine.global_rank == 0
    _link_states(engine.optimizer)
    model_state = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        whole = safe_get_full_fp32_param(tensor) if tensor.requires_grad else tensor
        if keep:
            model_state[name] = whole.detach().to("cpu", copy=True)
    states = list(engine.optimizer.optimizer.state.values())
    single = {key: value for key, value in (states[0] if states else {}).items() if not value.ndim}
    kept = [key for key in states[0] if key not in single] if states else []
    optimizer_state: dict[str, Any] = {}
    parameters = dict(engine.module.named_parameters())
    for name in (name for names in engine.grouped_names for name in names):
        whole = {key: safe_get_full_optimizer_state(parameters[name], key) for key in kept}
        if keep and states:
            values = {**{key: value.clone() for key, value in single.items()}, **whole}
            optimizer_state[name] = {key: value.detach().cpu() for key, value in values.items()}
    if not keep:
        return {}, {}
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": list(names)}
        for group, names in zip(engine.optimizer.param_groups, engine.grouped_names, strict=True)
    ]
    return model_state, {"state": optimizer_state, "param_groups": groups}


def scatter(engine: Any, model_state: dict[str, Tensor], optimizer_state: dict[str, Any]) -> None:
    """Put whole tensors back, each rank taking its part."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        if name not in model_state:  # frozen: it is there already
            continue
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0), torch.no_grad():
            tensor.copy_(model_state[name])
        if tensor.requires_grad:
            safe_set_full_fp32_param(tensor, model_state[name].to(engine.device))
    saved = optimizer_state["state"]
    if not saved:
        return
    _make_room(engine.optimizer, next(iter(saved.values())))
    parameters = dict(engine.module.named_parameters())
    for name, values in saved.items():
        for key, value in values.items():
            if value.ndim:
                safe_set_full_optimizer_state(parameters[name], value.to(engine.device), key)


def _make_room(zero: Any, example: dict[str, Tensor]) -> None:
    """Create the optimizer's state of the flattened tensors, as its first step would."""
    stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    flats = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    fused = any(group.get("fused") or group.get("capturable") for group in zero.param_groups)
    for flat in flats:
        zero.optimizer.state[flat] = {
            key: torch.zeros_like(flat)
            if value.ndim
            else value.clone().to(flat.device if fused else "cpu")
            for key, value in example.items()
        }
    _link_states(zero)


def _link_states(zero: Any) -> None:
    """Let stage 2's parameters find their states: it looks once, after the first group's step."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state") and zero.optimizer.state:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
