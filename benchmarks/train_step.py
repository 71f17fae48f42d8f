"""One training step of a phi-shaped model: forward, backward, clipping, AdamW, side by side.

All contestants start from the same weights and see the same batch; their losses are compared. What
each does is what its own code does on a CPU: LitGPT's `pretrain` (model compiled whole, its chunked
cross-entropy outside, AdamW not fused), transformers' PhiForCausalLM with its loss and Trainer's
fused AdamW, nanoGPT (model and loss compiled together), and ours (blocks compiled one by one,
chunked head, fused AdamW, freed memory kept). `--fused-for-all` gives everyone the fused optimizer.
Target: 1.2 times LitGPT compiled at half of its peak memory, and faster than every other row.

    python benchmarks/train_step.py                        # hidden 256 and 512, float32
    python benchmarks/train_step.py --precision bf16-mixed --width 256
    python benchmarks/train_step.py --malloc tuned --json train_step.json
"""

import os
import tempfile
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

VOCABULARY = 51200
ADAMW = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)


def gpt_config(width: int, layers: int, length: int) -> Any:
    """Return phi-1's architecture at another size: heads of 32, half of each rotated."""
    from litgpt.config import Config

    return Config.from_name(
        "phi-1_5", n_layer=layers, n_embd=width, n_head=width // 32,
        intermediate_size=4 * width, block_size=length, padded_vocab_size=VOCABULARY,
        rotary_percentage=0.5,
    )  # fmt: skip


def make_gpt(config: Any) -> Any:
    """Build LitGPT's model with the weights that everyone starts from."""
    import torch
    from litgpt.model import GPT

    torch.manual_seed(0)
    gpt = GPT(config)
    gpt.apply(gpt._init_weights)
    return gpt


def make_batch(config: Any, rows: int) -> tuple[Any, Any]:
    """Return the ids (rows, length) and their targets that everyone trains on."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (rows, config.block_size + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def build(kind: str, width: int, layers: int, length: int, rows: int, precision: str, fused: bool):  # type: ignore[no-untyped-def]
    """Return one training step of a contestant; calling it gives the loss before the step."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # so that compiling starts cold
    config = gpt_config(width, layers, length)
    return KINDS[kind](config, *make_batch(config, rows), precision, fused)


def step_of(
    loss_of: Callable[[], Any],
    parameters: list[Any],
    optimizer: Any,
    backward: Callable[[Any], None] = lambda loss: loss.backward(),
) -> Callable[[], float]:
    """Join the parts of a step that are the same for all (Fabric wants its own `backward`)."""
    from torch.nn.utils import clip_grad_norm_

    def step() -> float:
        loss = loss_of()
        backward(loss)
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def litgpt(compiled: bool) -> Callable[..., Any]:
    """Make what `litgpt pretrain` does: Fabric, the whole model compiled, the loss outside."""

    def make(config: Any, ids: Any, targets: Any, precision: str, fused: bool) -> Any:
        import torch
        from lightning import Fabric
        from litgpt.utils import chunked_cross_entropy

        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
        model = make_gpt(config)
        model = fabric.setup(torch.compile(model) if compiled else model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused, **ADAMW)
        return step_of(
            lambda: chunked_cross_entropy(model(ids), targets),
            list(model.parameters()),
            optimizer,
            fabric.backward,
        )

    return make


def ours(compiled: bool) -> Callable[..., Any]:
    """Make what our loop does: Fabric around the model with its loss, the blocks compiled."""

    def make(config: Any, ids: Any, targets: Any, precision: str, fused: bool) -> Any:
        import torch
        from lightning import Fabric

        from phi_lit.train.heap import keep_freed_memory
        from phi_lit.train.model import LossModel, compile_blocks

        keep_freed_memory()
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
        model = LossModel(make_gpt(config))
        if compiled:
            compile_blocks(model.gpt)
        wrapped = fabric.setup_module(model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
        parameters = list(model.parameters())
        return step_of(lambda: wrapped(ids, targets), parameters, optimizer, fabric.backward)

    return make


def transformers(config: Any, ids: Any, targets: Any, precision: str, fused: bool) -> Any:
    """Make PhiForCausalLM with its own loss; Trainer's optimizer is the fused AdamW."""
    import torch
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_phi
    from transformers import PhiConfig, PhiForCausalLM

    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=VOCABULARY, hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head, intermediate_size=config.intermediate_size,
            max_position_embeddings=config.block_size, partial_rotary_factor=0.5,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
            hidden_act="gelu_new", attn_implementation="sdpa", use_cache=False,
        )
    )  # fmt: skip
    weights: dict[str, Any] = {}
    copy_weights_phi(config, weights, make_gpt(config).state_dict())
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert all("inv_freq" in name for name in missing), missing
    if precision == "bf16-true":
        model = model.bfloat16()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    model.train()

    def loss_of() -> Any:
        with autocast:
            return model(input_ids=ids, labels=targets, shift_labels=targets).loss

    return step_of(loss_of, list(model.parameters()), optimizer)


def nanogpt(compiled: bool) -> Callable[..., Any]:
    """Make nanoGPT's way: the loss belongs to the model, and both are compiled as one."""

    def make(config: Any, ids: Any, targets: Any, precision: str, fused: bool) -> Any:
        import torch
        from torch import nn
        from torch.nn import functional as F

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gpt = make_gpt(config)

            def forward(self, ids: Any, targets: Any) -> Any:
                logits = self.gpt(ids)
                return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

        model: Any = Model()
        if precision == "bf16-true":
            model = model.bfloat16()
        if compiled:
            model = torch.compile(model)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused, **ADAMW)

        def loss_of() -> Any:
            with autocast:
                return model(ids, targets)

        return step_of(loss_of, list(model.parameters()), optimizer)

    return make


KINDS: dict[str, Callable[..., Any]] = {
    "litgpt": litgpt(False),
    "litgpt compiled": litgpt(True),
    "transformers": transformers,
    "nanogpt": nanogpt(False),
    "nanogpt compiled": nanogpt(True),
    "ours": ours(False),
    "ours compiled": ours(True),
}
NAMES = {
    "litgpt": "LitGPT, eager",
    "litgpt compiled": "LitGPT, compiled (its pretrain)",
    "transformers": "transformers PhiForCausalLM + loss",
    "nanogpt": "nanoGPT-style, eager",
    "nanogpt compiled": "nanoGPT-style, compiled",
    "ours": "ours, eager",
    "ours compiled": "ours, blocks compiled",
}


def peaks() -> dict[str, Contestant]:
    """Return the matrix products whose best time is the machine's measured peak."""
    return {
        "float32": Contestant(
            "matmul float32", build_product, {"dtype": "float32", "onednn": False}
        ),
        "float32 oneDNN": Contestant(
            "matmul float32, oneDNN", build_product, {"dtype": "float32", "onednn": True}
        ),
        "bfloat16": Contestant(
            "matmul bfloat16", build_product, {"dtype": "bfloat16", "onednn": False}
        ),
    }


def build_product(dtype: str, onednn: bool) -> Callable[[], None]:
    """Return one product of two 2048 x 2048 matrices, in PyTorch's library or in oneDNN."""
    import torch

    a, b = (torch.randn(2048, 2048).to(getattr(torch, dtype)) for _ in range(2))

    def run() -> None:
        if onednn:
            torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        else:
            torch.mm(a, b)

    return run


def matmul_flops(config: Any, tokens: int) -> float:
    """Count a step's multiplications and additions in matrix products.

    Six per weight that is multiplied (not the embedding, which is looked up) and token, and the
    causal half of the attention scores and their use: 6 x layers x width x length per token.
    """
    import torch
    from litgpt.model import GPT

    with torch.device("meta"):
        gpt = GPT(config)
    weights = sum(p.numel() for n, p in gpt.named_parameters() if p.ndim == 2 and "wte" not in n)
    attention = 6 * config.n_layer * config.n_embd * config.block_size
    return tokens * (6.0 * weights + attention)


def measure(width: int, args: Any) -> dict[str, Any]:
    """Measure all contestants at one width and print their table."""
    options = dict(
        width=width, layers=args.layers, length=args.length, rows=args.rows,
        precision=args.precision, fused=args.fused_for_all,
    )  # fmt: skip
    runners = [Contestant(NAMES[kind], build, dict(kind=kind, **options)) for kind in KINDS]
    runners = chosen(runners, args.only)
    ceilings = peaks()
    compete(
        [*ceilings.values(), *runners],
        rounds=args.rounds, threads=args.threads, malloc=args.malloc,
    )  # fmt: skip
    peak = {
        name: 2 * 2048**3 / min(runner.times) for name, runner in ceilings.items() if runner.times
    }
    print("\nmatmul peaks, GFLOPS: " + ", ".join(f"{k} {v / 1e9:.0f}" for k, v in peak.items()))
    top = max((v for k, v in peak.items() if k.startswith(_type_of(args.precision))), default=0.0)

    tokens = args.rows * args.length
    flops = matmul_flops(gpt_config(width, args.layers, args.length), tokens)
    baseline = next((r for r in runners if r.name == NAMES["litgpt compiled"]), runners[0])
    theirs = baseline.figures.get("memory", {})
    rows = []
    for runner in runners:
        seconds, memory = median(runner.times), runner.figures.get("memory", {})
        rows.append(
            (
                runner.name,
                seconds and 1e3 * seconds,
                seconds and tokens / seconds,
                ratio(baseline, runner),
                seconds and top and flops / seconds / top,
                memory.get("peak"),
                _share(memory, theirs, "peak"),
                memory.get("process"),
                _share(memory, theirs, "process"),
                runner.figures.get("start_seconds"),
                runner.failed or f"{runner.figures['first']:.4f}",
            )
        )
    print_table(
        ("", "ms", "tokens/s", "speed", "of peak", "MB", "MB ratio", "process MB",
         "process ratio", "cold start s", "first loss"),
        rows,
    )  # fmt: skip
    _check_losses(runners, args.precision)
    return {
        **options,
        "flops": flops,
        "peak_flops": peak,
        "rows": [
            {"name": r.name, "seconds": r.times, "failed": r.failed, **r.figures} for r in runners
        ],
    }


def _type_of(precision: str) -> str:
    return "float32" if precision == "32-true" else "bfloat16"


def _share(ours: dict[str, float], theirs: dict[str, float], key: str) -> float | None:
    return ours[key] / theirs[key] if key in ours and key in theirs else None


def _check_losses(runners: list[Contestant], precision: str) -> None:
    """Refuse a table of contestants that did not compute the same thing."""
    tolerance = 1e-5 if precision == "32-true" else 1e-3
    losses = [r.figures["first"] for r in runners if r.failed is None]
    if losses and max(losses) - min(losses) > tolerance * max(losses):
        raise SystemExit(f"the contestants' first losses differ by more than {tolerance}: {losses}")


def main() -> None:
    """Measure and print a table per width."""
    parser = arguments(__doc__ or "", rounds=9)
    parser.add_argument("--width", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument(
        "--precision", default="32-true", choices=("32-true", "bf16-mixed", "bf16-true")
    )
    parser.add_argument("--fused-for-all", action="store_true", help="fused AdamW for everyone")
    args = parser.parse_args()
    about = machine(args.threads)
    print_header(
        "One training step",
        {**about, "malloc": args.malloc, "precision": args.precision, "layers": args.layers,
         "tokens": f"{args.rows} x {args.length}", "vocabulary": VOCABULARY},
    )  # fmt: skip
    tables = []
    for width in args.width:
        print(f"\nhidden {width}; LitGPT compiled = 1", flush=True)
        tables.append(measure(width, args))
    write_json(
        args.json,
        {"machine": about, "malloc": args.malloc, "rounds": args.rounds, "tables": tables},
    )


if __name__ == "__main__":
    main()
