"""What dropout costs one block on a CPU: forward and backward, with and without.

Without dropout PyTorch's CPU attention is fused; with it PyTorch falls back to whole T x T
matrices. Ours (`phi_lit/train/attention.py`) works in strips. Every contestant is the same LitGPT
block (phi-1's architecture), and `attention only` leaves out all but the attention itself.

    python benchmarks/dropout_attention.py
    python benchmarks/dropout_attention.py --length 2048 --dtype bfloat16 --json dropout.json
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

SHARE = 0.1


def build(
    kind: str, part: str, length: int, tokens: int, width: int, dtype: str
) -> Callable[[], None]:
    """Return one forward and backward pass of a block, or of its attention alone."""
    return PARTS[part](kind, length, tokens, width, dtype)


def attention_only(
    kind: str, length: int, tokens: int, width: int, dtype: str
) -> Callable[[], None]:
    import torch
    from torch.nn import functional as F

    from phi_lit.train.attention import dropout_attention

    torch.manual_seed(0)
    type_, heads = getattr(torch, dtype), width // 32
    q, k, v = (
        torch.randn(tokens // length, length, heads, 32).to(type_).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    grad = torch.randn(q.shape).to(type_)

    def run() -> None:
        if kind == "ours":
            seed = torch.randint(2**62, (1,), dtype=torch.int64)
            out = dropout_attention(q, k, v, seed, SHARE, 32**-0.5)
        else:
            dropout = SHARE if kind == "naive" else 0.0
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        out.backward(grad)
        q.grad = k.grad = v.grad = None

    return run


def block(
    kind: str, length: int, tokens: int, width: int, dtype: str, compiled: bool = False
) -> Callable[[], None]:
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from torch.nn import functional as F

    from phi_lit.train.dropout import apply_dropout

    torch.manual_seed(0)
    config = Config.from_name(
        "phi-1_5", n_layer=1, n_embd=width, n_head=width // 32, intermediate_size=4 * width,
        block_size=length, padded_vocab_size=64,
    )  # fmt: skip
    gpt = GPT(config)
    if kind == "ours":
        apply_dropout(gpt, attention=SHARE, residual=SHARE)
    elif kind == "naive":
        apply_dropout(gpt, residual=SHARE)
        gpt.transformer.h[0].attn.scaled_dot_product_attention = lambda q, k, v, mask=None: (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=SHARE).transpose(1, 2)
        )
    type_ = getattr(torch, dtype)
    one = gpt.transformer.h[0].to(type_)
    if compiled:
        one.compile()
    cos, sin = gpt.cos[None], gpt.sin[None]
    x = torch.randn(tokens // length, length, width).to(type_).requires_grad_()
    grad = torch.randn(x.shape).to(type_)

    def run() -> None:
        one(x, cos, sin).backward(grad)
        x.grad = None
        one.zero_grad()

    return run


def compiled_block(
    kind: str, length: int, tokens: int, width: int, dtype: str
) -> Callable[[], None]:
    return block(kind, length, tokens, width, dtype, compiled=True)


PARTS: dict[str, Callable[..., Any]] = {
    "attention only": attention_only,
    "block": block,
    "block, compiled": compiled_block,
}
KINDS = {"none": "no dropout", "naive": "PyTorch's dropout", "ours": "ours"}


def main() -> None:
    """Measure and print a table per part and length; the first row of each is 1."""
    parser = arguments(__doc__ or "", rounds=11)
    parser.add_argument("--length", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--tokens", type=int, default=2048, help="rows x length")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    about = machine(args.threads)
    print_header(
        f"Dropout {SHARE} in a block, forward and backward",
        {**about, "malloc": args.malloc, "tokens": args.tokens, "hidden": args.width,
         "dtype": args.dtype},
    )  # fmt: skip
    tables = []
    for part in args.part:
        for length in args.length:
            options = dict(
                part=part, length=length, tokens=args.tokens, width=args.width, dtype=args.dtype
            )
            runners = chosen(
                [Contestant(name, build, dict(kind=k, **options)) for k, name in KINDS.items()],
                args.only,
            )
            compete(runners, rounds=args.rounds, threads=args.threads, malloc=args.malloc)
            print(f"\n{part}, {args.tokens // length} rows of {length}")
            print_table(
                ("", "ms", "time (no dropout = 1)", "peak MB"),
                [
                    (
                        runner.name,
                        1e3 * (median(runner.times) or 0),
                        1 / (ratio(runners[0], runner) or 1),
                        runner.figures.get("memory", {}).get("peak"),
                    )
                    for runner in runners
                ],
            )
            tables.append(
                {
                    **options,
                    "rows": [
                        {"name": r.name, "seconds": r.times, "failed": r.failed, **r.figures}
                        for r in runners
                    ],
                }
            )
    write_json(args.json, {"machine": about, "malloc": args.malloc, "tables": tables})


if __name__ == "__main__":
    main()
