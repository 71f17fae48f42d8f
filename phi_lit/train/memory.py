"""Bytes per GPU of a training step, by part, before anything is rented.

The formulas count what PyTorch keeps: parameters, gradients, optimizer state, what autograd saves
per block, the working set of the fused loss, what sharding gathers. `benchmarks/plan_check.py`
holds them against an allocator-exact measurement. What they leave out is the allocator's
fragmentation and the CUDA context (see `plan.py`). Letters: N tokens of a micro-batch, D hidden
size, V vocabulary.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from phi_lit.train.flops import ParameterCount, count_parameters

if TYPE_CHECKING:
    from litgpt.config import Config

    from phi_lit.train.job import Job, Machine

Checkpointing = Literal["none", "selective", "full"]

_CPU_TILE, _CPU_ROWS = 24 << 20, 4 << 20
"""What `head_cpu.py` holds beside its buffer: a tile of logits, and some rows of it in float32."""

_BYTES_OF_4_BITS = 0.6
"""Of a weight with its scale; what stays unquantized (the embedding) is small beside the rest."""

_GATHERED_BLOCKS = 3
"""Blocks that FSDP holds whole at a time: the one at work, the next one, its gather buffer."""


@dataclass(frozen=True)
class Layout:
    """How a model is trained, as far as it decides the memory of one device."""

    micro_batch: int
    """Rows per forward pass."""
    seq_length: int
    """Tokens per row."""
    precision: str = "bf16-mixed"
    """Fabric's name: 32-true, bf16-true, bf16-mixed, 16-mixed."""
    checkpointing: Checkpointing = "none"
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    compiled: bool = True
    fused_loss: bool = True
    """The loss never makes the whole logits."""
    optimizer: str = "AdamW"
    """Class path or name."""
    momentum: bool = False
    """SGD and RMSprop keep a moment only if asked."""
    strategy: Literal["single", "ddp", "fsdp", "deepspeed"] = "single"
    sharding: Literal["full", "grad_op", "hybrid"] = "full"
    ranks: int = 1
    """Devices that share one copy of what is sharded."""
    cpu_offload: bool = False
    accumulates: bool = True
    """Gradients of earlier micro-batches are there while a later one runs."""
    tie_embeddings: bool = False
    frozen: bool = False
    """Few parameters train: next to no gradients and optimizer state, none of the head's."""
    quantized: bool = False
    """Linear layers hold 4 bits per weight."""
    teacher_bytes: float = 0.0
    """Weights of a distillation's teacher on a device."""
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def mixed(self) -> bool:
        """Whether parameters are float32 and products half precision."""
        return self.precision.endswith("-mixed")

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one parameter, its gradient, and one float of optimizer state."""
        return 2 if self.precision.endswith("16-true") else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number in the matrix products."""
        return 4 if self.precision == "32-true" else 2

    @property
    def half_gathered(self) -> bool:
        """Whether what a rank multiplies with is gathered in half precision: FSDP1, for fp16."""
        return self.strategy == "deepspeed" or (
            self.strategy == "fsdp" and self.precision == "16-mixed"
        )

    @property
    def tokens(self) -> int:
        """N, the tokens of a micro-batch."""
        return self.micro_batch * self.seq_length


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


def layout_of(job: "Job", machine: "Machine", rows: int) -> Layout:
    """Return the layout that a job asks for on a machine."""
    train, arguments = job.train, job.arguments
    strategy, ranks = resolve_strategy(
        arguments.get("strategy"),
        arguments.get("sharding"),
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        cpu_offload=bool(arguments.get("cpu_offload")),
    )
    return Layout(
        micro_batch=rows,
        seq_length=job.length,
        precision=machine.precision,
        checkpointing=train.activation_checkpointing or "none",
        attention_dropout=train.attention_dropout or 0.0,
        residual_dropout=train.residual_dropout or 0.0,
        optimizer=optimizer_name(arguments["optimizer"]),
        momentum=has_momentum(arguments["optimizer"]),
        strategy=strategy,
        sharding=arguments.get("sharding") or "full",
        ranks=ranks,
        cpu_offload=bool(arguments.get("cpu_offload")),
        accumulates=train.global_batch_size > rows * machine.world,
        tie_embeddings=bool(train.tie_embeddings),
        frozen=job.adaptation is not None,
        quantized=bool(job.quantize),
        teacher_bytes=_teacher_bytes(job, machine),
        device="cuda" if machine.kind == "cuda" else "cpu",
    )


def _teacher_bytes(job: "Job", machine: "Machine") -> float:
    if job.train.teacher is None:
        return 0.0
    from phi_lit.train.teacher import bytes_of

    return bytes_of(job, machine)


def resolve_strategy(
    strategy: str | None, sharding: str | None, *, devices: int, num_nodes: int, cpu_offload: bool
) -> tuple[Any, int]:
    """Return what a strategy's key means on this many devices, and how many ranks share a copy."""
    world = devices * num_nodes
    if strategy in (None, "auto"):
        strategy = "fsdp" if world > 1 else "single"
    if strategy == "ddp":
        return ("ddp", 1) if world > 1 else ("single", 1)
    if strategy == "fsdp" and world == 1 and not cpu_offload:
        return "single", 1
    return strategy, devices if sharding == "hybrid" else world


def optimizer_name(optimizer: str | dict[str, Any]) -> str:
    """Return the class path or name of an optimizer as a config gives it."""
    return str(optimizer["class_path"] if isinstance(optimizer, dict) else optimizer)


def has_momentum(optimizer: str | dict[str, Any]) -> bool:
    """Tell whether an optimizer's arguments ask for momentum."""
    arguments = optimizer.get("init_args") or {} if isinstance(optimizer, dict) else {}
    return float(arguments.get("momentum") or 0) > 0


def predict(config: "Config", layout: Layout) -> Memory:
    """Predict the memory of one device by part.

    Args:
        config: any LitGPT model. The activations of models other than phi's kind (several norms,
            gated or routed MLPs) are estimates.
        layout: how it is trained.
    """
    count = count_parameters(config, tie_embeddings=layout.tie_embeddings)
    parameters, gradients, optimizer = _states(count, layout)
    copies = _weight_copies(config, count, layout)
    gathered, gathered_gradients = _gathered(count, layout)
    # Recomputed blocks round their weights anew; autocast keeps the first copies for the forward.
    kept_copies = copies if layout.checkpointing == "none" else 0.0
    block = saved_per_block(config, layout)
    kept = config.n_layer * _kept_per_block(config, layout, block)
    last = layout.tokens * config.n_embd * _residual_bytes(layout)  # the final norm's input
    working = _working_set(config, layout, block)
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
        return _deepspeed_states(count, layout)
    if layout.strategy == "fsdp":
        # Offloaded, all three rest in host memory; what the device needs is gathered.
        share = 0.0 if layout.cpu_offload else 1 / layout.ranks
        # Gradients are exchanged with the last micro-batch only: earlier ones add up unsharded.
        whole = count.total * _gathered_bytes(layout) if layout.accumulates else 0
        return size * share, size * share + whole, state * share
    buckets = 2 if layout.strategy == "ddp" else 1  # DDP reduces gradients in buffers of its own
    return size, size * buckets, state


def _deepspeed_states(count: ParameterCount, layout: Layout) -> tuple[float, float, float]:
    """ZeRO 2 or 3: half-precision weights, float32 master weights and moments in shards."""
    share = 1 / layout.ranks
    whole = float(count.total * layout.compute_bytes)
    master = 0.0 if layout.cpu_offload else 12.0 * count.total * share
    if layout.sharding == "grad_op":
        return whole, whole * share, master
    return (0.0 if layout.cpu_offload else whole * share), whole * share, master


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
    if not layout.mixed or layout.half_gathered:
        return 0.0
    head = 0 if layout.fused_loss else config.padded_vocab_size * config.n_embd  # type: ignore[operator]
    return 2.0 * (count.total - count.outside + head)


def _gathered_bytes(layout: Layout) -> int:
    return layout.compute_bytes if layout.half_gathered else layout.parameter_bytes


def _gathered(count: ParameterCount, layout: Layout) -> tuple[float, float]:
    """Return bytes of (parameters, gradients) that a sharded run holds whole for a time.

    Embedding and head belong to no block and stay whole during a step.
    """
    if layout.strategy not in ("fsdp", "deepspeed"):
        return 0.0, 0.0
    size = _gathered_bytes(layout)
    gradients = float((count.block + count.outside) * size)
    if layout.sharding != "grad_op":
        return float((_GATHERED_BLOCKS * count.block + count.outside) * size), gradients
    if layout.strategy == "deepspeed":  # its parameters are whole to begin with
        return 0.0, gradients
    return float(count.total * size), gradients


# ------------------------------------------------------------------------------------- activations


def _residual_bytes(layout: Layout) -> int:
    """Bytes of one number of the residual stream: float32 wherever the embedding is."""
    return layout.compute_bytes if layout.half_gathered else layout.parameter_bytes


def saved_per_block(config: "Config", layout: Layout) -> float:
    """Return the bytes that one block saves for its backward pass, without checkpointing."""
    masks = 2 * config.n_embd * _mask_bytes(layout) if layout.residual_dropout else 0
    return layout.tokens * (
        _norm_bytes(config, layout)
        + _attention_bytes(config, layout)
        + _mlp_bytes(config, layout)
        + masks
    )


def _mask_bytes(layout: Layout) -> int:
    """Bytes of one number of a dropout mask: booleans, but eager CPU multiplies with numbers."""
    eager_cpu = layout.device == "cpu" and not layout.compiled
    return layout.compute_bytes if eager_cpu else 1


def _norm_bytes(config: "Config", layout: Layout) -> float:
    """Per token: the norms' inputs, and their outputs, which are the products' inputs."""
    s, r, d = layout.compute_bytes, _residual_bytes(layout), config.n_embd
    inputs = 1 if config.parallel_residual else 2  # both norms of a parallel block read the same
    outputs = 1 if config.shared_attention_norm else 2
    if layout.mixed and config.shared_attention_norm and not layout.compiled:
        outputs = 2  # eager autocast rounds the shared norm's output once for each reader
    total = float(inputs * r * d + outputs * s * d)
    if config.norm_class_name == "RMSNorm":
        total += 4 * d * (1 if config.shared_attention_norm else 2)  # scaled in float32
    return total


def _attention_bytes(config: "Config", layout: Layout) -> float:
    """Per token: q and k after rotation, v, the output twice (as heads and side by side).

    `attention.py`, which drops attention weights on a CPU, keeps its output once.
    """
    assert config.head_size is not None
    assert config.n_query_groups is not None
    s = layout.compute_bytes
    width = config.n_head * config.head_size
    if config.n_query_groups == config.n_head:
        inputs = 5 * width  # v is a view: it keeps q, k and v as they left the product
    else:
        inputs = 3 * width  # keys and values repeated for every query head
    if layout.attention_dropout and layout.device == "cpu":
        return float(s * (inputs + width))
    statistics = 4 * config.n_head
    return float(s * (inputs + 2 * width) + statistics)


def _mlp_bytes(config: "Config", layout: Layout) -> float:
    """Per token: the inner activations before and after the non-linearity."""
    s = layout.compute_bytes
    inner = config.intermediate_size or 4 * config.n_embd
    if config.n_expert:
        inner = (config.moe_intermediate_size or inner) * config.n_expert_per_token
        # Each kept expert reads a gathered row and adds a weighted one.
        return s * (4 * inner + 3 * config.n_embd * config.n_expert_per_token)
    return s * inner * (2 if config.mlp_class_name == "GptNeoxMLP" else 4)


def _kept_per_block(config: "Config", layout: Layout, block: float) -> float:
    """Return the bytes of one block that are kept until its backward pass."""
    if layout.checkpointing == "none":
        return block
    entrance = layout.tokens * config.n_embd * _residual_bytes(layout)
    if layout.checkpointing == "full":
        return entrance
    assert config.head_size is not None
    assert config.n_query_groups is not None
    heads = config.n_head + 2 * config.n_query_groups  # of the first product; the output's follow
    numbers = (heads + config.n_head) * config.head_size + (config.intermediate_size or 0)
    if config.mlp_class_name != "GptNeoxMLP":
        numbers += config.intermediate_size or 0  # two products side by side
    if not layout.compiled:  # the compiler sees that nobody reads the branches' last products again
        numbers += 2 * config.n_embd
    masks = 0
    if layout.residual_dropout and layout.device == "cuda":
        masks = 2 * config.n_embd
        numbers += 0 if layout.compiled else 2 * config.n_embd
    return entrance + layout.tokens * (layout.compute_bytes * numbers + masks)


def _working_set(config: "Config", layout: Layout, block: float) -> float:
    """Return what one block's backward pass needs beside what was kept."""
    gradients = layout.tokens * config.n_embd * layout.compute_bytes * 5
    return gradients + block - min(block, _kept_per_block(config, layout, block))


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
