"""`litgpt finetune_full`, extended: from arguments to the loop, and nothing more.

Where a config uses no data module or option of ours, LitGPT's own `setup` runs unchanged. A model
of ours alone does not change that: its checkpoint is a LitGPT checkpoint like any other.
"""

from pathlib import Path
from typing import Literal

from litgpt.args import EvalArgs, LogArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.prompts import Default
from litgpt.types import LoggerChoice

from phi_lit.train.args import Sharding, Strategy, TrainArgs
from phi_lit.train.pretrain import options_are_ours, run_stock


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/full"),
    precision: str | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(  # noqa: B008
        save_interval=1000,
        log_interval=1,
        global_batch_size=16,
        micro_batch_size=1,
        lr_warmup_steps=100,
        epochs=5,
        max_seq_length=None,
    ),
    eval: EvalArgs = EvalArgs(interval=600, max_new_tokens=100, max_iters=100),  # noqa: B008
    log: LogArgs = LogArgs(),  # noqa: B008
    optimizer: str | dict = "AdamW",
    logger_name: LoggerChoice = "csv",
    seed: int = 1337,
    access_token: str | None = None,
    strategy: Strategy | None = None,
    sharding: Sharding | None = None,
    cpu_offload: bool = False,
) -> None:
    """Finetune a model.

    Arguments:
        checkpoint_dir: The path to the base model's checkpoint directory to load for finetuning.
        out_dir: Directory in which to save checkpoints and logs. If running in a Lightning Studio Job, look for it in
            /teamspace/jobs/<job-name>/share.
        precision: The precision to use for finetuning. Possible choices: "bf16-true", "bf16-mixed", "32-true", "16-mixed".
        devices: How many devices/GPUs to use
        num_nodes: How many nodes the code is being run on.
        resume: Path to a checkpoint directory to resume from in case training was interrupted, or ``True`` to resume
            from the latest checkpoint in ``out_dir``. An error will be raised if no checkpoint is found. Passing
            ``'auto'`` will resume from the latest checkpoint but not error if no checkpoint exists.
        data: Data-related arguments. If not provided, the default is ``litgpt.data.Alpaca``.
        train: Training-related arguments. See ``phi_lit.train.args.TrainArgs`` for details.
        eval: Evaluation-related arguments. See ``litgpt.args.EvalArgs`` for details.
        optimizer: An optimizer name (such as "AdamW") or config.
        logger_name: The name of the logger to send metrics to.
        seed: The random seed to use for reproducibility.
        access_token: Optional API token to access models with restrictions.
        strategy: How several devices share the work: auto (fsdp where there are several), ddp (a copy each), fsdp
            (parameters sharded) or deepspeed (ZeRO).
        sharding: What fsdp and deepspeed shard: full (all; ZeRO 3), grad_op (parameters stay whole between
            forward and backward; ZeRO 2), hybrid (full within a node, a copy per node; fsdp only).
        cpu_offload: Keep sharded parameters and optimizer state in host memory.
    """  # noqa: E501 (LitGPT's own lines, so that --help reads the same)
    from phi_lit.seams import stock

    arguments = {name: value for name, value in locals().items() if name != "stock"}
    if not options_are_ours(arguments):
        run_stock(stock("litgpt.finetune.full.setup"), arguments)
        return
    from phi_lit.train.foreign import base_checkpoint
    from phi_lit.train.job import Job
    from phi_lit.train.launch import launch

    checkpoint_dir = base_checkpoint(checkpoint_dir, access_token)
    if data is None:
        from litgpt.data import Alpaca

        data = arguments["data"] = Alpaca()
    arguments["access_token"] = None  # a secret has no place in hyperparameters.yaml
    launch(
        Job(
            command="finetune",
            config=Config.from_file(checkpoint_dir / "model_config.yaml"),
            data=data,
            tokenizer_dir=checkpoint_dir,
            weights_dir=checkpoint_dir,
            prompt_style=getattr(data, "prompt_style", Default()),
            arguments=arguments,
        )
    )
