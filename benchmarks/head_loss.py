"""The head and its cross-entropy alone: forward, backward, time and exact peak memory.

The memory column leaves out what every contestant must make, the gradients of hidden states, weight
and bias. Targets: at most a fifth of plain's memory, and not slower.

    python benchmarks/head_loss.py
    python benchmarks/head_loss.py --dtype bfloat16 --rounds 15 --json head_loss.json
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

CHUNKS = (128, 256, 512, 1024)


def build(kind: str, tokens: int, width: int, vocabulary: int, dtype: str) -> Callable[[], float]:
    """Return one forward and backward pass of a contestant."""
    import torch

    torch.manual_seed(0)
    type_ = getattr(torch, dtype)
    hidden = torch.randn(tokens, width, dtype=type_, requires_grad=True)
    weight = (torch.randn(vocabulary, width) * 0.02).to(type_).requires_grad_()
    bias = torch.zeros(vocabulary, dtype=type_, requires_grad=True)
    target = torch.randint(0, vocabulary, (tokens,))
    loss_of = LOSSES[kind.split(":")[0]](*kind.split(":")[1:])

    def run() -> float:
        loss = loss_of(hidden, weight, bias, target)
        loss.backward()
        hidden.grad = weight.grad = bias.grad = None
        return float(loss.detach())

    return run


def plain() -> Callable[..., Any]:
    from torch.nn import functional as F

    return lambda hidden, weight, bias, target: F.cross_entropy(
        F.linear(hidden, weight, bias).float(), target
    )


def compiled_plain() -> Callable[..., Any]:
    import torch

    return torch.compile(plain())


def litgpt() -> Callable[..., Any]:
    from litgpt.utils import chunked_cross_entropy
    from torch.nn import functional as F

    return lambda hidden, weight, bias, target: chunked_cross_entropy(
        F.linear(hidden, weight, bias), target
    )


def litgpt_chunked_head() -> Callable[..., Any]:
    from litgpt.utils import chunked_cross_entropy
    from torch.nn import functional as F

    def loss(hidden: Any, weight: Any, bias: Any, target: Any) -> Any:
        chunks = [F.linear(x, weight, bias) for x in hidden[None].split(128, dim=1)]
        return chunked_cross_entropy(chunks, target[None])

    return loss


def transformers() -> Callable[..., Any]:
    from torch.nn import functional as F
    from transformers.loss.loss_utils import ForCausalLMLoss

    return lambda hidden, weight, bias, target: ForCausalLMLoss(
        F.linear(hidden, weight, bias), None, weight.shape[0], shift_labels=target
    )


def torch_fused(rows: str = "") -> Callable[..., Any]:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn import functional as F

    options = LinearCrossEntropyOptions(batch_chunk_size=int(rows) if rows else None)
    return lambda hidden, weight, bias, target: F.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, options=options
    )


def ours(chunk: str = "") -> Callable[..., Any]:
    from phi_lit.train.loss import linear_cross_entropy

    rows = int(chunk) if chunk else None
    return lambda hidden, weight, bias, target: (
        linear_cross_entropy(hidden, weight, bias, target, chunk=rows).loss
    )


LOSSES: dict[str, Callable[..., Any]] = {
    "plain": plain,
    "compiled": compiled_plain,
    "litgpt": litgpt,
    "litgpt_head": litgpt_chunked_head,
    "transformers": transformers,
    "torch": torch_fused,
    "ours": ours,
}


def contestants(options: dict[str, Any]) -> list[Contestant]:
    """Return everyone that can run here; torch's own operation exists from 2.13."""
    from torch.nn import functional as F

    kinds = {
        "plain: logits, F.cross_entropy": "plain",
        "plain, compiled": "compiled",
        "LitGPT chunked_cross_entropy": "litgpt",
        "LitGPT lm_head_chunk_size 128": "litgpt_head",
        "transformers ForCausalLMLoss": "transformers",
    }
    if hasattr(F, "linear_cross_entropy"):
        kinds["torch linear_cross_entropy, auto"] = "torch"
        kinds["torch linear_cross_entropy, 512 rows"] = "torch:512"
    kinds["ours"] = "ours"
    kinds |= {f"ours, {rows} rows": f"ours:{rows}" for rows in CHUNKS}
    return [Contestant(name, build, dict(kind=kind, **options)) for name, kind in kinds.items()]


def main() -> None:
    """Measure and print the table."""
    parser = arguments(__doc__ or "", rounds=9)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=51200)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("tokens", "width", "vocabulary", "dtype")}
    runners = chosen(contestants(sizes), args.only)
    about = machine(args.threads)
    print_header("Head and loss alone", {**about, **sizes, "malloc": args.malloc})
    compete(runners, rounds=args.rounds, threads=args.threads, malloc=args.malloc)

    tokens, width, vocabulary = args.tokens, args.width, args.vocabulary
    size = 4 if args.dtype == "float32" else 2
    gradients = size * (tokens * width + vocabulary * width + vocabulary) / 1e6
    baseline = runners[0]
    rows = []
    for runner in runners:
        memory = runner.figures.get("memory")
        extra = memory["peak"] - memory["held"] - gradients if memory else None
        runner.figures["extra_mb"] = extra
        first = baseline.figures.get("extra_mb")
        rows.append(
            (
                runner.name,
                median(runner.times) and 1e3 * (median(runner.times) or 0),
                ratio(baseline, runner),
                extra,
                extra / first if extra is not None and first else None,
                runner.failed or f"{runner.figures['first']:.5f}",
            )
        )
    print_table(
        ("", "ms", "speed (plain = 1)", "peak MB beyond gradients", "of plain", "loss"), rows
    )
    write_json(
        args.json,
        {
            "machine": about,
            **sizes,
            "malloc": args.malloc,
            "rows": [
                {"name": r.name, "seconds": r.times, "failed": r.failed, **r.figures}
                for r in runners
            ],
        },
    )


if __name__ == "__main__":
    main()
