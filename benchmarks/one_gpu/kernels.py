"""What a step is made of, timed alone: the matmul peak, head and loss, attention."""

from collections.abc import Callable, Iterator
from typing import Any

from one_gpu.device import clean_up, memory, one_line, reset_peak, time_of


def measure_kernels(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield times of what the step is made of: matmul peak, head and loss, attention."""
    import torch

    from phi_lit.train.devices import measure_peak, peak_for

    where, dtype = torch.device(device), torch.bfloat16
    measured, listed = measure_peak(dtype, where), peak_for(where, dtype)
    yield {"kernel": "matmul bf16", "tflops": measured / 1e12, "share_of_peak": measured / listed}
    on_gpu = device == "cuda"
    n, d, v = (16_384, 2048, 51_200) if on_gpu else (256, 64, 512)
    for name, loss in head_losses(on_gpu, quick):
        try:
            yield {"kernel": f"head + loss: {name}", **time_head(loss, n, d, v, where)}
        except Exception as error:
            yield {"kernel": f"head + loss: {name}", "error": one_line(error)}
        clean_up()
    shape = (8, 32, 2048, 64) if on_gpu else (1, 2, 64, 32)
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        for dropout in (0.0, 0.1) if on_gpu else (0.0,):
            name = f"attention: {backend.lower()}, dropout {dropout}"
            try:
                yield {"kernel": name, **time_attention(backend, dropout, shape, where)}
            except RuntimeError as error:
                yield {"kernel": name, "error": one_line(error)}


def head_losses(on_gpu: bool, quick: bool) -> list[tuple[str, Callable[..., Any]]]:
    """Return the ways to get from hidden states to a loss, by name."""
    import torch
    from litgpt.utils import chunked_cross_entropy

    from phi_lit.train.loss import linear_cross_entropy

    def plain(x: Any, w: Any, b: Any, y: Any) -> Any:
        return torch.nn.functional.cross_entropy((x @ w.t() + b).float(), y)

    def litgpt(x: Any, w: Any, b: Any, y: Any) -> Any:
        return chunked_cross_entropy((x @ w.t() + b)[None], y[None])

    def ours(**options: Any) -> Callable[..., Any]:
        return lambda x, w, b, y: linear_cross_entropy(x, w, b, y, **options).loss

    found = [("plain", plain), ("litgpt's chunked", litgpt), ("ours, torch", ours(backend="torch"))]
    if on_gpu:
        found.append(("ours, liger", ours(backend="liger")))
        for chunk in () if quick else (1024, 2048, 4096, 8192):
            found.append((f"ours, torch, {chunk} rows", ours(backend="torch", chunk=chunk)))
    return found


def time_head(loss: Callable[..., Any], n: int, d: int, v: int, device: Any) -> dict[str, float]:
    """Time forward and backward of a head with its loss, and take its peak memory."""
    import torch

    x = torch.randn(n, d, device=device, dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(v, d, device=device) * 0.02).bfloat16().requires_grad_()
    b = torch.zeros(v, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(0, v, (n,), device=device)

    def once() -> None:
        for tensor in (x, w, b):
            tensor.grad = None
        loss(x, w, b, y).backward()

    reset_peak(device)
    held = memory(device)
    seconds = time_of(once, device)
    used = memory(device).get("peak_gb", 0.0) - held.get("peak_gb", 0.0)
    return {
        "milliseconds": 1e3 * seconds,
        "tflops": 6 * n * d * v / seconds / 1e12,
        "extra_gb": used,
    }


def time_attention(
    backend: str, dropout: float, shape: tuple[int, ...], device: Any
) -> dict[str, float]:
    """Time forward and backward of causal attention under one kernel; error if it cannot."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def once() -> None:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            y = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=dropout
            )
        torch.autograd.grad(y.sum(), (q, k, v))

    return {"milliseconds": 1e3 * time_of(once, device)}
