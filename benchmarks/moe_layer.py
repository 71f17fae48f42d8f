"""A mixture of experts against the dense MLP of equal active FLOPs and LitGPT's loop.

Forward and backward of one layer, router included, in training mode. The dense MLP is 4 x as wide
as the hidden size; a token's kept experts are together as wide as that. LitGPT's loop is its
`LLaMAMoE.forward` over experts of the same kind. `composed` is our other path: PyTorch's grouped
product. `--decode` instead times one token without gradients.

    python benchmarks/moe_layer.py
    python benchmarks/moe_layer.py --cases 8x2048 --dtype bfloat16 --json moe.json
    python benchmarks/moe_layer.py --decode
"""

from collections.abc import Callable
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

CASES = [f"{experts}x{tokens}" for experts in (4, 8, 16, 64) for tokens in (2048, 8192)]
KINDS = {
    "dense": "dense MLP",
    "loop": "LitGPT's loop",
    "ours": "ours",
    "composed": "ours, composed",
}


def build(kind: str, **options: Any) -> Callable[[], None]:
    """Return one forward and backward pass of a layer, or one decoded token."""
    import torch

    torch.manual_seed(0)
    layer = make_layer(kind, **{k: options[k] for k in ("experts", "kept", "width", "activation")})
    dtype = getattr(torch, options["dtype"])
    layer = layer.to(dtype)
    tokens = 1 if options["decode"] else options["tokens"]
    x = torch.randn(1, tokens, options["width"]).to(dtype)
    grad = torch.randn(x.shape).to(dtype)
    if options["decode"]:
        layer.eval()

        @torch.no_grad()
        def decode() -> None:
            for _ in range(20):  # one is too short for a clock
                layer(x)

        return decode
    x.requires_grad_()

    def run() -> None:
        layer(x).backward(grad)
        x.grad = None
        layer.zero_grad()

    return run


def make_layer(kind: str, experts: int, kept: int, width: int, activation: str) -> Any:
    """Return LitGPT's dense MLP, LitGPT's mixture, or ours."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GptNeoxMLP, LLaMAMLP, LLaMAMoE

    mlp = {"gelu": GptNeoxMLP, "swiglu": LLaMAMLP}[activation]
    inner = 4 * width
    config = Config(
        name="phi-bench", hf_config={"moe": {"activation": activation}}, n_layer=1, n_embd=width,
        n_head=1, intermediate_size=inner, moe_intermediate_size=inner // kept, n_expert=experts,
        n_expert_per_token=kept, gelu_approximate="tanh", mlp_class_name="PhiMoE", bias=True,
    )  # fmt: skip
    if kind == "dense":
        return mlp(config)
    if kind == "loop":
        moe = LLaMAMoE(config)
        moe.experts = torch.nn.ModuleList(mlp(config, inner // kept) for _ in range(experts))
        return moe
    from extensions.phi_moe import PhiMoE

    layer = PhiMoE(config)
    layer.experts.path = "composed" if kind == "composed" else "auto"
    return layer


def main() -> None:
    """Measure and print a table per case; the dense MLP is 1."""
    parser = arguments(__doc__ or "", rounds=9)
    parser.add_argument("--cases", nargs="+", default=[*CASES, "64x4096"], help="experts x tokens")
    parser.add_argument("--kept", type=int, default=2, help="experts per token")
    parser.add_argument("--width", type=int, default=512, help="hidden size")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--activation", default="gelu", choices=("gelu", "swiglu"))
    parser.add_argument("--decode", action="store_true", help="one token, no gradients")
    args = parser.parse_args()
    about = machine(args.threads)
    shared = dict(
        kept=args.kept, width=args.width, dtype=args.dtype, activation=args.activation,
        decode=args.decode,
    )  # fmt: skip
    print_header(
        "One token decoded" if args.decode else "Experts in a layer, forward and backward",
        {**about, "malloc": args.malloc, **shared},
    )
    cases = sorted({(int(e), 1 if args.decode else int(t)) for e, t in split(args.cases)})
    tables = []
    for experts, tokens in cases:
        options = dict(experts=experts, tokens=tokens, **shared)
        kinds = {k: name for k, name in KINDS.items() if k != "composed" or not args.decode}
        runners = chosen(
            [Contestant(name, build, dict(kind=k, **options)) for k, name in kinds.items()],
            args.only,
        )
        compete(runners, rounds=args.rounds, threads=args.threads, malloc=args.malloc)
        print(f"\n{experts} experts, {tokens} tokens")
        rows = [row(runner, runners, tokens, args.decode) for runner in runners]
        print_table(("", "ms", "speed (dense = 1)", "speed (loop = 1)", "peak MB"), rows)
        tables.append(
            {
                **options,
                "rows": [
                    {
                        "name": r.name, "seconds": r.times, "failed": r.failed,
                        "of_dense": against(runners, "dense", r),
                        "of_loop": against(runners, "loop", r), **r.figures,
                    }
                    for r in runners
                ],
            }
        )  # fmt: skip
    write_json(args.json, {"machine": about, "malloc": args.malloc, "tables": tables})


def split(cases: list[str]) -> list[list[str]]:
    return [case.split("x") for case in cases]


def against(runners: list[Contestant], kind: str, runner: Contestant) -> float | None:
    """Return the speed relative to a kind that takes part."""
    base = next((other for other in runners if other.name == KINDS[kind]), None)
    return ratio(base, runner) if base else None


def row(
    runner: Contestant, runners: list[Contestant], tokens: int, decode: bool
) -> tuple[Any, ...]:
    """Return a line of the table."""
    milliseconds = 1e3 * (median(runner.times) or 0) / (20 if decode else 1)
    return (
        runner.name if runner.failed is None else f"{runner.name}: {runner.failed}",
        milliseconds,
        against(runners, "dense", runner),
        against(runners, "loop", runner),
        runner.figures.get("memory", {}).get("peak"),
    )


if __name__ == "__main__":
    main()
