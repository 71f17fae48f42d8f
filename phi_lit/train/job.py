"""What a training command wants, and the processes it gets: plain records.

A `Job` is the command's arguments with the model and data they name; a `Machine` the devices and
the number format. `launch.py` checks them, `build.py` makes a run of them.
"""

from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from litgpt.args import EvalArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.prompts import PromptStyle

from phi_lit.train.adaptation import Adaptation
from phi_lit.train.args import TrainArgs


@dataclass
class Job:
    """What a command wants: a model, its data, and all of the command's arguments."""

    command: str
    """`pretrain` or `finetune`, for the names of logs."""
    config: Config
    data: DataModule
    tokenizer_dir: Path | None
    weights_dir: Path | None
    """A LitGPT checkpoint to take the first weights from, or None."""
    prompt_style: PromptStyle
    """What chat and generate put around a prompt, stored with each checkpoint."""
    arguments: dict[str, Any]
    """The command's parameters by name, to be recorded."""
    adaptation: Adaptation | None = None
    """How few parameters are finetuned; None for all."""

    @property
    def train(self) -> TrainArgs:
        """The training options."""
        return self.arguments["train"]

    @property
    def eval(self) -> EvalArgs:
        """The validation options."""
        return self.arguments["eval"]

    @property
    def quantize(self) -> str | None:
        """How frozen weights are quantized (`bnb.nf4` and the like), or None."""
        return self.arguments.get("quantize")

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.train.max_seq_length or self.config.block_size


@dataclass(frozen=True)
class Machine:
    """The processes and the number format that a job runs with."""

    devices: int
    num_nodes: int
    precision: str
    kind: str
    """`cpu` or `cuda`."""

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes


def plain(value: Any) -> Any:
    """Return a value as YAML can hold it: a data module becomes class_path and init_args."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "connect"):  # a data module, as jsonargparse writes it
        names = [field.name for field in fields(value) if field.init] if is_dataclass(value) else []
        return {
            "class_path": f"{type(value).__module__}.{type(value).__qualname__}",
            "init_args": {name: plain(getattr(value, name)) for name in names},
        }
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if type(value).__str__ is object.__str__ and type(value).__repr__ is object.__repr__:
        # Such as a prompt style: an address in memory would differ in every process.
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"class_path": kind, "init_args": plain(vars(value))}
    return str(value)


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping with dotted keys, as loggers want their hyperparameters."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found.update(flat(item, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = item if item is not None else "null"
    return found
