"""The experts of a layer in one operation, with gradients written by hand.

Visits (a token at one of its experts) are sorted by expert, so that each expert's are one
contiguous segment and its products are ordinary ones. What autograd would make of such a loop is
avoided: a gradient of the whole stack per expert, a tensor of all visits' inputs and one of their
outputs. About a thousand visits at a time are gathered, multiplied and added where they belong
while they are in the caches: a piece of one expert's, or several experts' together.
This is a registered operation, so compilers, FLOP counters, the meta device and selective
checkpointing see one node with known shapes, however the tokens fall.

Letters in tensor names: N tokens, D hidden size, E experts, K experts per token, S = N * K visits
sorted by expert, F inner size, H what the first product gives: F, or 2 F where it is gated.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from extensions.phi_moe import pages
from extensions.phi_moe.activation import activate_quickly, activate_with_slope
from extensions.phi_moe.gemm import product, rows_to_copy_from

ROWS = 1024
"""Visits at a time, or nearly: what they make of activations should stay in the caches."""


def sort_visits(expert_NK: Tensor, load_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the visits in the order of their experts (S,), int64, and where segments end (E,).

    Visit number n * K + k is token n at its k-th expert. The ends are int32.
    """
    return expert_NK.flatten().argsort(stable=True), load_E.cumsum(0).to(torch.int32)


def _batches(end_E: Tensor) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Yield (visits, their pieces): about `ROWS` visits, and per expert (expert, rows among them).

    An expert with many visits has even pieces in several batches; experts with few share one.
    """
    start, pieces = 0, list[tuple[int, slice]]()
    for expert, (first, end) in enumerate(pairwise([0, *end_E.tolist()])):
        parts = max(1, round((end - first) / ROWS))
        rows = -(-(end - first) // parts)
        while first < end:
            stop = min(first + rows, end)
            if pieces and stop - start > ROWS:
                yield slice(start, first), pieces
                start, pieces = first, []
            pieces.append((expert, slice(first - start, stop - start)))
            first = stop
    if pieces:
        yield slice(start, start + pieces[-1][1].stop), pieces


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _put(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """Write `left.T @ right` into `out`, or add it to what is there."""
    copied = left.dtype == torch.float32 and len(left) >= rows_to_copy_from()
    if out.dtype == left.dtype and not copied:
        if add:
            out.addmm_(left.t(), right)
        else:
            torch.mm(left.t(), right, out=out)
        return
    made = product(left.t(), right.t())
    (out.add_ if add else out.copy_)(made)


def _put_all(
    grads: list[Tensor | None],
    expert: int,
    h_grad: Tensor,
    x: Tensor,
    grad: Tensor,
    a: Tensor,
    add: bool,
) -> None:
    """Put one expert's visits into its gradients, or add them to what is there."""
    fc, fc_bias, proj, proj_bias = grads
    assert fc is not None
    assert proj is not None
    _put(fc[expert], h_grad, x, add)
    _put(proj[expert], grad, a, add)
    if fc_bias is not None and proj_bias is not None:
        put = Tensor.add_ if add else Tensor.copy_
        put(fc_bias[expert], h_grad.sum(0))
        put(proj_bias[expert], grad.sum(0))


def _row(stack: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor | None:
    return None if stack is None else stack[expert].to(dtype)


@torch.library.custom_op("phi_moe::experts", mutates_args=())
def experts(
    x_ND: Tensor,
    weight_NK: Tensor,
    order_S: Tensor,
    end_E: Tensor,
    fc_EHD: Tensor,
    fc_bias_EH: Tensor | None,
    proj_EDF: Tensor,
    proj_bias_ED: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of each token's experts (N, D), and the first products (S, H).

    Computes in the type of `x_ND`, whatever that of the parameters is; sums over experts are
    taken in float32 at least.

    Args:
        x_ND: the tokens.
        weight_NK: of each token's experts, in float32 at least.
        order_S: from `sort_visits`.
        end_E: likewise.
        fc_EHD: first products' weights.
        fc_bias_EH: their biases.
        proj_EDF: last products' weights.
        proj_bias_ED: their biases.
        activation: "gelu", "gelu_tanh" or "swiglu".
    """
    kept, dtype = weight_NK.shape[1], x_ND.dtype
    token_S, weight_S = order_S // kept, weight_NK.flatten()[order_S]
    y_ND = x_ND.new_zeros(x_ND.shape, dtype=weight_NK.dtype)
    h_SH = x_ND.new_empty((len(order_S), fc_EHD.shape[1]))
    for visits, pieces in _batches(end_E):
        token = token_S[visits]
        x, h = x_ND.index_select(0, token), h_SH[visits]
        for expert, rows in pieces:
            bias = _row(fc_bias_EH, expert, dtype)
            h[rows] = product(x[rows], fc_EHD[expert].to(dtype), bias)
        a = activate_quickly(h, activation)
        y = _join(
            [
                product(a[rows], proj_EDF[expert].to(dtype), _row(proj_bias_ED, expert, dtype))
                for expert, rows in pieces
            ]
        )
        y_ND.index_add_(0, token, y.to(y_ND.dtype).mul_(weight_S[visits, None]))
    return y_ND.to(dtype), h_SH


@experts.register_fake
def _(x_ND: Tensor, weight_NK: Tensor, order_S: Tensor, end_E: Tensor, *rest: Any) -> Any:
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty((order_S.shape[0], rest[0].shape[1]))


@torch.library.custom_op("phi_moe::experts_backward", mutates_args=())
def experts_backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    weight_NK: Tensor,
    order_S: Tensor,
    end_E: Tensor,
    fc_EHD: Tensor,
    fc_bias_EH: Tensor | None,
    proj_EDF: Tensor,
    proj_bias_ED: Tensor | None,
    h_SH: Tensor,
    activation: str,
    trains: bool,
) -> list[Tensor]:
    """Return the gradients of tokens, weights and, if `trains`, of the four stacks in order.

    Without a bias its gradient is left out. Experts that nobody visited get zeros.
    """
    kept, dtype = weight_NK.shape[1], x_ND.dtype
    token_S, weight_S = order_S // kept, weight_NK.flatten()[order_S]
    x_grad = x_ND.new_zeros(x_ND.shape, dtype=weight_NK.dtype)
    weight_grad_S = torch.empty_like(weight_S)
    stacks = (fc_EHD, fc_bias_EH, proj_EDF, proj_bias_ED)
    grads = [None if s is None or not trains else pages.empty_again(s, s.shape) for s in stacks]
    for expert, count in enumerate(end_E.diff(prepend=end_E.new_zeros(1)).tolist()):
        for stack_grad in grads:
            if stack_grad is not None and not count:
                stack_grad[expert].zero_()
    before = -1
    for visits, pieces in _batches(end_E):
        token, weight = token_S[visits], weight_S[visits, None]
        x, grad = x_ND.index_select(0, token) if trains else None, grad_ND.index_select(0, token)
        a, back = activate_with_slope(h_SH[visits], activation)
        inner = _join([product(grad[rows], proj_EDF[e].to(dtype).t()) for e, rows in pieces])
        visit_grad = (inner * a).sum(1, dtype=weight.dtype)
        if proj_bias_ED is not None:
            for expert, rows in pieces:
                visit_grad[rows] += torch.mv(grad[rows], proj_bias_ED[expert].to(dtype))
        weight_grad_S[visits] = visit_grad
        grad = (grad * weight).to(dtype)
        h_grad = back((inner * weight).to(dtype))
        if x is not None:
            for expert, rows in pieces:
                _put_all(
                    grads, expert, h_grad[rows], x[rows], grad[rows], a[rows], expert == before
                )
                before = expert
        made = _join([product(h_grad[rows], fc_EHD[e].to(dtype).t()) for e, rows in pieces])
        x_grad.index_add_(0, token, made.to(x_grad.dtype))
    weight_grad_NK = torch.empty_like(weight_S)
    weight_grad_NK[order_S] = weight_grad_S
    return [
        x_grad.to(dtype),
        weight_grad_NK.view_as(weight_NK),
        *(grad for grad in grads if grad is not None),
    ]


@experts_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    _, x_ND, weight_NK, _, _, *stacks, _, _, trains = arguments
    made = (x_ND, weight_NK, *(stack for stack in stacks if stack is not None and trains))
    return [like.new_empty(like.shape) for like in made]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.activation = inputs
    ctx.set_materialize_grads(False)  # nobody reads `h`: its gradient would be S x H zeros
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_ND: Tensor, _h: Tensor) -> tuple:
    *tensors, h_SH = ctx.saved_tensors
    trains = any(ctx.needs_input_grad[4:8])
    made = iter(experts_backward(grad_ND, *tensors, h_SH, ctx.activation, trains))
    x_grad, weight_grad = next(made), next(made)
    stack_grads = [next(made) if trains and stack is not None else None for stack in tensors[4:8]]
    return x_grad, weight_grad, None, None, *stack_grads, None


experts.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.phi_moe.experts)
def _forward_flops(
    x: Any,
    weight: Any,
    order: Any,
    end: Any,
    fc: Any,
    fc_bias: Any,
    proj: Any,
    *rest: Any,
    **_: Any,
) -> int:
    """Count a multiply and an add as two, for each visit; arguments come as shapes."""
    return 2 * order[0] * (fc[1] * fc[2] + proj[1] * proj[2])


@register_flop_formula(torch.ops.phi_moe.experts_backward)
def _backward_flops(
    grad: Any, x: Any, weight: Any, order: Any, end: Any, fc: Any, fc_bias: Any, proj: Any,
    *rest: Any, **_: Any,
) -> int:  # fmt: skip
    """Count both gradients of both products; frozen stacks need only one."""
    return (1 + bool(rest[-1])) * _forward_flops(x, weight, order, end, fc, fc_bias, proj)
