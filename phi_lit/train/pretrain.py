"""`litgpt pretrain`, extended: from arguments to the loop, and nothing more.

Where a config uses no model, data module or option of ours, LitGPT's own `setup` runs unchanged.
Everything that can be wrong is checked here before hours are spent; the training is in `loop.py`.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from litgpt.args import EvalArgs, LogArgs
from litgpt.args import TrainArgs as LitGPTTrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.prompts import Default
from litgpt.types import LoggerChoice

from phi_lit.errors import UserError
from phi_lit.train.args import Sharding, Strategy, TrainArgs, asks_for_ours

Precision = Literal["bf16-true", "bf16-mixed", "32-true", "16-mixed", None]


def setup(
    model_name: str,
    model_config: Config | None = None,
    out_dir: Path = Path("out/pretrain"),
    precision: Precision = None,
    initial_checkpoint_dir: Path | None = None,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(  # noqa: B008
        save_interval=1000,
        log_interval=1,
        global_batch_size=512,
        micro_batch_size=4,
        max_tokens=int(3e12),  # 3 trillion
        max_norm=1.0,
        min_lr=4e-5,
        lr_warmup_steps=2000,
        tie_embeddings=False,
    ),
    eval: EvalArgs = EvalArgs(interval=1000, max_iters=100),  # noqa: B008
    log: LogArgs = LogArgs(),  # noqa: B008
    optimizer: str | dict = "AdamW",
    devices: int | str = "auto",
    num_nodes: int = 1,
    tokenizer_dir: Path | None = None,
    logger_name: LoggerChoice = "tensorboard",
    seed: int = 42,
    strategy: Strategy | None = None,
    sharding: Sharding | None = None,
    cpu_offload: bool = False,
) -> None:
    """Pretrain a model.

    Arguments:
        model_name: The name of the model to pretrain. Choose from names in ``litgpt.config``. Use "list" to list the
            supported models.
        model_config: A ``litgpt.Config`` object to define the model architecture. Mutually exclusive with
            ``model_config``. Overrides the `model_name` if specified.
        out_dir: Directory in which to save checkpoints and logs. If running in a Lightning Studio Job, look for it in
            /teamspace/jobs/<job-name>/share.
        precision: The precision to use for training. Determines a compatible precision setting by default.
        initial_checkpoint_dir: Optional path to a checkpoint directory to initialize the model from.
            Useful for continued pretraining. Mutually exclusive with ``resume``.
        resume: Path to a checkpoint directory to resume from in case training was interrupted, or ``True`` to resume
            from the latest checkpoint in ``out_dir``. An error will be raised if no checkpoint is found. Passing
            ``'auto'`` will resume from the latest checkpoint but not error if no checkpoint exists.
        data: Data-related arguments. If not provided, the default is ``litgpt.data.TinyLlama``, or
            ``phi_lit.CodeTextbook`` for a model of phi_lit.
        train: Training-related arguments. See ``phi_lit.train.args.TrainArgs`` for details.
        eval: Evaluation-related arguments. See ``litgpt.args.EvalArgs`` for details.
        optimizer: An optimizer name (such as "AdamW") or config.
        devices: How many devices/GPUs to use. Uses all GPUs by default.
        num_nodes: How many nodes the code is being run on.
        tokenizer_dir: Optional path to the tokenizer dir that was used for preprocessing the dataset. Only some data
            module require this.
        logger_name: The name of the logger to send metrics to.
        seed: The random seed to use for reproducibility.
        strategy: How several devices share the work: auto (fsdp where there are several), ddp (a copy each), fsdp
            (parameters sharded) or deepspeed (ZeRO).
        sharding: What fsdp and deepspeed shard: full (all; ZeRO 3), grad_op (parameters stay whole between
            forward and backward; ZeRO 2), hybrid (full within a node, a copy per node; fsdp only).
        cpu_offload: Keep sharded parameters and optimizer state in host memory.
    """  # noqa: E501 (LitGPT's own lines, so that --help reads the same)
    from phi_lit.seams import stock

    arguments = {name: value for name, value in locals().items() if name != "stock"}
    if model_name == "list":
        run_stock(stock("litgpt.pretrain.setup"), arguments)
        return
    config = model_config or Config.from_name(model_name)  # an unknown name is answered here
    refuse_two_models(model_name, model_config)
    if not _is_ours(config, arguments):
        run_stock(stock("litgpt.pretrain.setup"), arguments)
        return
    from phi_lit.train.job import Job
    from phi_lit.train.launch import launch

    if data is None:
        from phi_lit.data.textbook import CodeTextbook

        data = arguments["data"] = CodeTextbook()
    launch(
        Job(
            command="pretrain",
            config=config,
            data=data,
            tokenizer_dir=tokenizer_dir,
            weights_dir=initial_checkpoint_dir,
            prompt_style=Default(),  # phi-1 completes code: no "Answer:" appended
            arguments=arguments,
        )
    )


def refuse_two_models(model_name: str, model_config: Config | None) -> None:
    """Raise if a model of ours is named and another one is described beside it.

    LitGPT lets `--model_config.n_layer 2` replace the named model by a nameless one of 4,096 wide.
    """
    from phi_lit.registry import MODELS

    short = model_name.rpartition("/")[2]
    if model_config is not None and short in MODELS and model_config.name != short:
        raise UserError(
            f"model_name {model_name} and a model_config of another model "
            f"({model_config.name or 'no name'}, n_layer {model_config.n_layer}, n_embd "
            f"{model_config.n_embd}) are both given, and the name would be ignored; leave one out, "
            "or give model_config the same name and all its fields"
        )


def run_stock(function: Callable[..., None], arguments: dict[str, Any]) -> None:
    """Call LitGPT's own `setup` with those of the arguments that it knows."""
    stock_train = {
        field.name: getattr(arguments["train"], field.name) for field in fields(LitGPTTrainArgs)
    }
    parameters = inspect.signature(function).parameters
    known = {name: value for name, value in arguments.items() if name in parameters}
    function(**{**known, "train": LitGPTTrainArgs(**stock_train)})


OWN_PARAMETERS = ("strategy", "sharding", "cpu_offload")
"""What our `setup` functions take beside LitGPT's parameters."""


def _is_ours(config: Config, arguments: dict[str, Any]) -> bool:
    from phi_lit.registry import MODELS

    return config.name in MODELS or options_are_ours(arguments)


def options_are_ours(arguments: dict[str, Any]) -> bool:
    """Tell whether a command's options ask for anything that LitGPT's own loop does not know."""
    data = arguments["data"]
    return (
        (data is not None and type(data).__module__.partition(".")[0] == "phi_lit")
        or asks_for_ours(arguments["train"])
        or arguments["precision"] == "16-mixed"
        or any(arguments[name] for name in OWN_PARAMETERS)
    )
