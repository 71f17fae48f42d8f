"""How a model is trained, as far as it decides the memory of one device.

A `Layout` is made of a job and its machine, or of what `phi-lit plan` is asked; `memory.py` and
`activations.py` turn it into bytes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from phi_lit.train.job import Job, Machine

Checkpointing = Literal["none", "selective", "full"]


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
    stacked: bool = False
    """Experts are stacked parameters, which no strategy gathers in bf16."""
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
    def half_weights(self) -> bool:
        """Whether all that the forward pass sees is fp16: FSDP1's and DeepSpeed's way."""
        return self.strategy in ("fsdp", "deepspeed") and self.precision == "16-mixed"

    @property
    def half_blocks(self) -> bool:
        """Whether the blocks' linear layers are gathered in bf16 (FSDP2, see `strategy.py`)."""
        cut = not (self.compiled and self.checkpointing != "none")
        half = self.strategy == "fsdp" and self.precision == "bf16-mixed"
        return half and cut and not self.stacked

    @property
    def weight_bytes(self) -> int:
        """Bytes of one number of what embeddings, norms and the head compute with."""
        return 2 if self.half_weights else self.parameter_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one number of the blocks' weights where they are whole."""
        return 2 if self.half_blocks else self.weight_bytes

    @property
    def tokens(self) -> int:
        """N, the tokens of a micro-batch."""
        return self.micro_batch * self.seq_length


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

    return bytes_of(job.train, machine.precision, machine.world)


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
