"""A whole training step with experts beside its dense twin of equal active parameters.

Forward, loss, backward with the balancing losses, clipping, AdamW over all parameters: what our
loop does in a step, not the layer alone. The twin is the same model with one MLP as wide as what a
token visits. Target: at least 0.80 of the twin's tokens/s on a GPU (OLMoE reports 0.63, nanochat
0.76), and 0.95 for the layer alone on a CPU at 4 to 8 experts. On a CPU the optimizer weighs more
than on a GPU: it steps all experts, and a step has few tokens; `--rows` shows it.

    python benchmarks/moe_step.py                          # phi1-nano-moe, float32
    python benchmarks/moe_step.py --precision bf16-mixed --rows 4 8 32
"""

from pathlib import Path
from typing import Any

from _measure import (
    Contestant,
    arguments,
    chosen,
    compete,
    machine,
    median,
    print_header,
    print_table,
    ratio,
    write_json,
)
from train_step import ADAMW, step_of


def build(config: Any, rows: int, precision: str, weights: str | None = None, ids: Any = None):  # type: ignore[no-untyped-def]
    """Return one training step; calling it gives the loss before the step.

    Args:
        config: a model's name, a `litgpt.config.Config`, or its arguments.
        rows: rows of the model's context in the batch.
        precision: Fabric's.
        weights: a checkpoint directory to start from; the loop's `normal` initialisation otherwise.
        ids: (rows, T + 1) token ids; random ones otherwise.
    """
    import torch
    from lightning import Fabric
    from litgpt.config import Config
    from litgpt.model import GPT

    from phi_lit.train.args import TrainArgs
    from phi_lit.train.checkpoint import load_weights
    from phi_lit.train.experts import Experts, apply_expert_options
    from phi_lit.train.heap import keep_freed_memory
    from phi_lit.train.init import initialize
    from phi_lit.train.model import LossModel

    keep_freed_memory()
    if not isinstance(config, Config):
        config = Config.from_name(config) if isinstance(config, str) else Config(**config)
    torch.manual_seed(0)
    gpt = GPT(config)
    initialize(gpt, "normal")
    if weights is not None:
        load_weights(gpt, Path(weights))
    apply_expert_options(gpt, TrainArgs(balance_loss=0.01, router_z_loss=0.001))
    fabric = Fabric(accelerator="auto", devices=1, precision=precision)  # type: ignore[arg-type]
    model = LossModel(gpt)
    wrapped = fabric.setup_module(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True, **ADAMW)
    if ids is None:
        ids = torch.randint(0, config.padded_vocab_size, (rows, config.block_size + 1))
    ids = fabric.to_device(ids)
    experts = Experts.of(gpt, bias_rate=0.0)

    def loss_of() -> Any:
        experts.begin(fabric, [ids[:, :-1].numel()])
        experts.weigh(0)
        return wrapped(ids[:, :-1], ids[:, 1:])

    return step_of(loss_of, parameters, optimizer, fabric.backward)


def twin_of(name: str) -> dict[str, Any]:
    """Return the dense model whose one MLP is as wide as what a token visits in `name`."""
    from litgpt.config import Config, name_to_config

    config = Config.from_name(name)
    experts = config.n_expert_per_token + (config.n_shared_expert or 0)
    width = experts * (config.moe_intermediate_size or config.intermediate_size)
    if ((config.hf_config or {}).get("moe") or {}).get("placement") == "after":
        width += config.intermediate_size
    dense = dict(
        name_to_config[name], name=f"{name}-twin", hf_config={}, mlp_class_name="GptNeoxMLP",
        n_expert=0, n_expert_per_token=0, moe_intermediate_size=None, n_shared_expert=None,
        intermediate_size=width,
    )  # fmt: skip
    return dense


def main() -> None:
    from phi_lit.train.flops import count_parameters

    parser = arguments(__doc__.splitlines()[0], rounds=9)
    parser.add_argument("--model_name", default="phi1-nano-moe")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--rows", type=int, nargs="+", default=[8])
    options = parser.parse_args()
    from litgpt.config import Config

    about = machine(options.threads)
    moe, dense = Config.from_name(options.model_name), Config(**twin_of(options.model_name))
    print_header(f"A training step of {moe.name}, {options.precision}", about)
    figures = []
    for rows in options.rows:
        contestants = chosen(
            [
                Contestant("dense twin", build, dict(
                    config=twin_of(moe.name), rows=rows, precision=options.precision)),
                Contestant(moe.name, build, dict(
                    config=moe.name, rows=rows, precision=options.precision)),
            ],
            options.only,
        )  # fmt: skip
        compete(contestants, rounds=options.rounds, threads=options.threads, malloc=options.malloc)
        for contestant, config in zip(contestants, (dense, moe), strict=False):
            counted, middle = count_parameters(config), median(contestant.times)
            tokens = rows * config.block_size
            figures.append({
                "model": contestant.name, "tokens per step": tokens,
                "parameters": counted.total, "active": counted.active,
                "tokens/s": tokens / middle if middle else None,
                "of the twin": ratio(contestants[0], contestant),
                "failed": contestant.failed,
            })  # fmt: skip
    columns = ["model", "tokens per step", "parameters", "active", "tokens/s", "of the twin"]
    print_table(columns, [[row[key] for key in columns] for row in figures])
    write_json(options.json, {"machine": about, "options": vars(options) | {"json": None},
                              "figures": figures})  # fmt: skip


if __name__ == "__main__":
    main()
