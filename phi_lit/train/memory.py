"""Bytes per GPU of a training step, by part, before anything is rented.

The formulas count what PyTorch keeps: parameters, gradients, optimizer state, what autograd saves
per block, the working set of the fused loss, what sharding gathers. `benchmarks/plan_check.py`
holds them against an allocator-exact measurement. What they leave out is the allocator's
fragmentation and the CUDA context (see `plan.py`). Letters: N tokens of a micro-batch, D hidden
size, V vocabulary.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from phi_lit.experts import MOE_CLASS
from phi_lit.train.activations import kept_per_block, residual_bytes, saved_per_block, working_set
from phi_lit.train.deepspeed import BUCKET, LIVE
from phi_lit.train.flops import ParameterCount, count_parameters
from phi_lit.train.layout import Layout, layout_of
from phi_lit.train.memory_experts import stack_numbers

if TYPE_CHECKING:
    from litgpt.config import Config

    from phi_lit.train.job import Job, Machine

_CPU_TILE, _CPU_ROWS = 24 << 20, 4 << 20
"""What `head_cpu.py` holds beside its buffer: a tile of logits, and some rows of it in float32."""

_BYTES_OF_4_BITS = 0.6
"""Of a weight with its scale; what stays unquantized (the embedding) is small beside the rest."""

_GATHERED_BLOCKS = 3
"""Blocks that FSDP holds whole at a time: the one at work, the next one, its gather buffer."""


@dataclass(frozen=True)
class Memory:
    """Predicted bytes on one device, by part, and the peak of a step.

    Not all parts are there at the same time: `total` is the highest of the moments that a step
    passes through, so it may be less than their sum.
    """

    parameters: float
    gradients: float
    optimizer: float
    weight_copies: float
    """Half-precision copies of the weights that autocast keeps from forward to backward."""
    gathered: float
    """Parameters and gradients that sharding gathers for a time."""
    activations: float
    """What the blocks save for the backward pass."""
    recomputed: float
    """One block's activations while the backward pass makes them anew, and its working set."""
    loss: float
    """Gradients that the fused loss makes on the way, and the logits of a chunk."""
    kept: float
    """All that is there after the forward pass and was not before."""
    teacher: float
    """A distillation's teacher."""
    total: float
    """The peak."""

    def parts(self) -> dict[str, float]:
        """Return the parts by name, without the peak."""
        left_out = ("total", "kept")
        return {name: size for name, size in asdict(self).items() if name not in left_out}


def predict_memory(job: "Job", machine: "Machine", rows: int) -> Memory:
    """Predict a job's memory per device with `rows` rows per forward pass."""
    return predict(job.config, layout_of(job, machine, rows))


def predict(config: "Config", layout: Layout) -> Memory:
    """Predict the memory of one device by part.

    Args:
        config: any LitGPT model. The activations of models other than phi's kind (several norms,
            gated or routed MLPs) are estimates.
        layout: how it is trained.
    """
    layout = replace(layout, stacked=config.mlp_class_name == MOE_CLASS)
    count = count_parameters(config, tie_embeddings=layout.tie_embeddings)
    parameters, gradients, optimizer = _states(count, layout)
    copies = _weight_copies(config, count, layout)
    gathered, gathered_gradients = _gathered(count, layout)
    # Recomputed blocks round their weights anew; autocast keeps the first copies for the forward.
    kept_copies = copies if layout.checkpointing == "none" else 0.0
    block = saved_per_block(config, layout)
    kept = config.n_layer * kept_per_block(config, layout, block)
    last = layout.tokens * config.n_embd * residual_bytes(layout)  # the final norm's input
    working = working_set(config, layout, block)
    hidden, head, chunk = _loss(config, layout)
    retained = hidden + head

    waiting = gradients if layout.accumulates else 0.0
    base = parameters + optimizer + gathered + layout.teacher_bytes
    moments = {
        "loss": base + waiting + copies + kept + last + retained + chunk,
        "backward": base + waiting + gathered_gradients
        + kept_copies + kept + last + hidden + (0 if layout.accumulates else head) + working,
        "end of backward": base + gradients + gathered_gradients + working + kept / config.n_layer,
        "optimizer": base - gathered + gradients + _optimizer_temporary(count, layout),
    }  # fmt: skip
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        weight_copies=copies,
        gathered=gathered + gathered_gradients,
        activations=kept + last,
        recomputed=working,
        loss=retained + chunk,
        kept=kept + last + kept_copies + retained,
        teacher=layout.teacher_bytes,
        total=max(moments.values()),
    )


def largest_fitting(config: "Config", layout: Layout, room: float, most: int) -> int:
    """Return the most rows per forward pass whose peak is at most `room` bytes.

    Args:
        config: the model.
        layout: how it is trained; its `micro_batch` and `accumulates` are not looked at.
        room: bytes.
        most: rows of a device's share of a step.

    Returns:
        0 where not even one row fits, and at most `most`.
    """

    def fits(rows: int) -> bool:
        tried = replace(layout, micro_batch=rows, accumulates=rows < most)
        return predict(config, tried).total <= room

    if fits(most):
        return most
    low, high = 0, most  # `low` fits (or is none), `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ------------------------------------------------------------------------------------------- state


def _states(count: ParameterCount, layout: Layout) -> tuple[float, float, float]:
    """Return bytes of (parameters, gradients, optimizer state) on the device."""
    state = count.total * state_bytes_per_parameter(count, layout)
    size = float(count.total * layout.parameter_bytes)
    if layout.frozen:
        size *= _BYTES_OF_4_BITS / layout.parameter_bytes if layout.quantized else 1
        return size / (layout.ranks if layout.strategy == "fsdp" else 1), 0.0, 0.0
    if layout.strategy == "deepspeed":
        return _deepspeed_states(count, layout, state)
    if layout.strategy == "fsdp":
        # Offloaded, all three rest in host memory; what the device needs is gathered.
        share = 0.0 if layout.cpu_offload else 1 / layout.ranks
        # Gradients are exchanged with the last micro-batch only: earlier ones add up unsharded.
        whole = count.total * layout.weight_bytes if layout.accumulates else 0
        return size * share, size * share + whole, state * share
    buckets = 2 if layout.strategy == "ddp" else 1  # DDP reduces gradients in buffers of its own
    return size, size * buckets, state


def _deepspeed_states(
    count: ParameterCount, layout: Layout, state: float
) -> tuple[float, float, float]:
    """ZeRO 2 (weights whole) or 3: the optimizer has float32 weights of its own beside its state.

    Gradients are exchanged with every micro-batch, so none add up unsharded.
    """
    size, share = float(count.total * layout.weight_bytes), 1 / layout.ranks
    whole = layout.sharding == "grad_op"
    if layout.cpu_offload:
        return size if whole else 0.0, 0.0, 0.0
    return size if whole else size * share, size * share, (state + 4 * count.total) * share


_MOMENTS = {"sgd": 0.0, "rmsprop": 1.0, "adagrad": 1.0, "lion": 1.0, "adafactor": 0.01}
"""Numbers of state per parameter of optimizers that do not keep Adam's two."""


def state_bytes_per_parameter(count: ParameterCount, layout: Layout) -> float:
    """Return the optimizer's bytes per parameter: AdamW has two moments of the parameter's type."""
    name = layout.optimizer.rpartition(".")[2].lower()
    kind = name.removeprefix("paged").removesuffix("8bit").removesuffix("32bit")
    moments = _MOMENTS.get(kind, 2.0) + (1.0 if layout.momentum else 0.0)
    if "8bit" in name:
        return moments * (1 + 4 / 256)  # one float32 scale per block of 256
    if name == "muon":  # one moment for the matrices inside the blocks, AdamW for the rest
        moments = 1.0 + count.outside / count.total
    return moments * layout.parameter_bytes


def _optimizer_temporary(count: ParameterCount, layout: Layout) -> float:
    """Return what the optimizer's step needs for a time: nothing where it is fused."""
    name = layout.optimizer.rpartition(".")[2].lower()
    if name in ("adamw", "adam", "sgd", "adagrad") or "8bit" in name:
        return 0.0
    return float(count.total * layout.parameter_bytes / layout.ranks)


def _weight_copies(config: "Config", count: ParameterCount, layout: Layout) -> float:
    """Autocast's half-precision copies of what enters matrix products.

    Autograd saves them for the backward pass. Sharding does not divide them: each rank multiplies
    with whole weights. The fused loss lets go of its copy of the head.
    """
    # DeepSpeed's linear function for stage 3 keeps none, see `deepspeed.config_of`.
    spared = layout.strategy == "deepspeed" and layout.sharding != "grad_op"
    if not layout.mixed or layout.half_weights or layout.half_blocks or spared:
        return 0.0
    head = 0 if layout.fused_loss else config.padded_vocab_size * config.n_embd  # type: ignore[operator]
    one_by_one = stack_numbers(config) if layout.device == "cpu" else 0
    return 2.0 * (count.total - count.outside - one_by_one + head)


def _gathered(count: ParameterCount, layout: Layout) -> tuple[float, float]:
    """Return bytes of (parameters, gradients) that a sharded run holds whole for a time.

    Embedding and head belong to no block and stay whole during a step.
    """
    if layout.strategy not in ("fsdp", "deepspeed"):
        return 0.0, 0.0
    outside = float(count.outside * layout.weight_bytes)
    if layout.strategy == "deepspeed":
        gradients = float(BUCKET * layout.weight_bytes)
        if layout.sharding == "grad_op":  # its parameters are whole to begin with
            return 0.0, gradients
        live = min(count.total - count.outside, LIVE)
        return float(live * layout.weight_bytes) + outside, gradients
    gradients = float((count.block + count.outside) * layout.weight_bytes)
    blocks = count.total - count.outside
    if layout.sharding != "grad_op":
        blocks = min(blocks, _GATHERED_BLOCKS * count.block)
    return float(blocks * layout.block_bytes) + outside, gradients


# -------------------------------------------------------------------------------------------- loss


def _loss(config: "Config", layout: Layout) -> tuple[float, float, float]:
    """Return bytes of head and loss: what is kept of the size of the hidden states, of the size of
    the head's weight, and what is needed for a time.

    The first two are gradients that the fused loss makes on the way.
    """
    n, d, v = layout.tokens, config.n_embd, int(config.padded_vocab_size or 0)
    s = layout.compute_bytes
    if not layout.fused_loss:  # float32 log-probabilities stay; the rest passes
        return 4.0 * n * v, 0.0, float(n * v * (8 if s == 4 else s + 8))
    from phi_lit.train.loss import chunk_rows

    rows = min(chunk_rows(v, layout.device), n)
    copies = (n + v) * d * s if layout.mixed else 0  # hidden states and weight, in half precision
    weight_grad = 0.0 if layout.frozen else 4.0 * v * d
    if layout.device == "cpu":  # at the end of `head_cpu.py` the weight's gradient is there twice
        tiles = min(_CPU_TILE, 4 * rows * v) * s / 4 + (0 if s == 4 else _CPU_ROWS)
        chunk = copies + max(rows * v * s + tiles, weight_grad)
    else:
        chunk = copies + rows * v * (s + 4 + (4 if s < 4 else 0))
    return 4.0 * n * d, weight_grad, float(chunk)
