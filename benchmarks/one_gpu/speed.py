"""Tokens/s, MFU and memory of one contestant at growing micro-batch sizes."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

from one_gpu.cases import Case
from one_gpu.device import clean_up, is_out_of_memory, memory, reset_peak
from one_gpu.sides import BUILDERS


def measure_speed(
    case: Case, device: str, tried: list[int], steps: int, accumulate: int
) -> Iterator[dict[str, Any]]:
    """Yield a result per micro-batch size; stops after the first that does not fit."""
    for rows in tried:
        try:
            yield {"micro_batch": rows, **measure_size(case, device, rows, steps, accumulate)}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield {"micro_batch": rows, "out_of_memory": True}
            return
        finally:
            clean_up()


def measure_size(case: Case, device: str, rows: int, steps: int, accumulate: int) -> dict[str, Any]:
    """Train some steps and return speed, memory, and the losses as a sign that it trains."""
    import torch
    from lightning import Fabric
    from litgpt.config import Config

    from phi_lit.registry import MODELS
    from phi_lit.train import flops
    from phi_lit.train.devices import arithmetic_of, peak_for

    config = Config(**MODELS[case.model])
    fabric = Fabric(accelerator=device, devices=1, precision=case.precision)  # type: ignore[arg-type]
    torch.manual_seed(0)
    loss_of, module = BUILDERS[case.side](case, config, fabric)
    fused = device in ("cuda", "cpu")
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=fused)
    )
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(
        0, config.vocab_size, (accumulate, rows, config.block_size + 1), generator=generator
    ).to(fabric.device)

    def step() -> float:
        total = 0.0
        for batch in data:
            loss = loss_of(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            fabric.backward(loss / accumulate)
            total = loss.detach() / accumulate + total
        fabric.clip_gradients(module, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)  # waits for the device

    began = time.perf_counter()
    losses = [step() for _ in range(2)]
    start = time.perf_counter() - began
    reset_peak(fabric.device)
    times = []
    for _ in range(steps):
        before = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - before)
    tokens = accumulate * rows * config.block_size / statistics.median(times)
    peak = peak_for(fabric.device, arithmetic_of(case.precision))
    return {
        "tokens_per_second": tokens,
        "mfu_6n": flops.mfu(tokens, flops.flops_per_token_6n(config), peak),
        "mfu_6n_12ldt": flops.mfu(tokens, flops.flops_per_token_6n_12ldt(config), peak),
        "step_seconds": statistics.median(times),
        "spread": (max(times) - min(times)) / statistics.median(times),
        "start_seconds": start,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **memory(fabric.device),
        **predicted(case, config, rows, accumulate, device),
    }


def predicted(case: Case, config: Any, rows: int, accumulate: int, device: str) -> dict[str, float]:
    """Return what `phi-lit plan` would have said about our side's memory."""
    from phi_lit.train.layout import Layout
    from phi_lit.train.memory import predict

    if case.side != "ours":
        return {}
    layout = Layout(
        micro_batch=rows,
        seq_length=config.block_size,
        precision=case.precision,
        checkpointing=case.checkpointing,  # type: ignore[arg-type]
        attention_dropout=case.dropout,
        residual_dropout=case.dropout,
        compiled=case.compile,
        accumulates=accumulate > 1,
        device="cuda" if device == "cuda" else "cpu",
    )
    return {"predicted_gb": predict(config, layout).total / 1e9}
