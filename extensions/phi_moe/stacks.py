"""Linear layers of one shape in one tensor, and products of sorted rows with them.

Rows (visits of tokens to experts) lie in the order of their experts, so that each expert's are one
contiguous segment. Letters in tensor names: S rows, E experts, J features in, M features out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from extensions.phi_moe.grouped import can_group, grouped_mm


class StackedLinear(nn.Module):
    """E linear layers of one shape.

    Args:
        n_expert: E.
        size_in: J.
        size_out: M.
        bias: whether they add one.
        residual: they project onto the residual stream, which some schemes of initialisation treat
            apart.
        silent: weights start at zero.
    """

    matrices = ("weight",)
    """Parameters that are linear layers' weights, for optimizers that treat those apart."""

    linears: nn.ModuleList | None
    """In place of `weight` and `bias` after `as_linears`."""

    def __init__(self, n_expert: int, size_in: int, size_out: int, **options: bool) -> None:
        nn.Module.__init__(self)
        self.make_parameters(n_expert, size_in, size_out, **options)

    def make_parameters(
        self,
        n_expert: int,
        size_in: int,
        size_out: int,
        *,
        bias: bool,
        residual: bool = False,
        silent: bool = False,
    ) -> None:
        """Do what `__init__` does, in an object that is a module already."""
        self.n_expert, self.residual, self.silent = n_expert, residual, silent
        self.linears = None  # not of the class: that would hide the submodule it may become
        self.weight = nn.Parameter(torch.empty(n_expert, size_out, size_in))
        self.bias = nn.Parameter(torch.empty(n_expert, size_out)) if bias else None
        StackedLinear.reset_parameters(self)

    @property
    def is_plain(self) -> bool:
        """Whether `weight` and `bias` are all there is to it."""
        return self.linears is None

    def reset_parameters(self) -> None:
        """Draw the weights anew (std 0.02), biases zero."""
        self.init_weights(std=0.02, residual_std=0.02)

    def init_weights(self, *, std: float, residual_std: float) -> None:
        """Draw the weights from a normal distribution, biases zero."""
        std = residual_std if self.residual else std
        nn.init.normal_(self.weight, std=0.0 if self.silent else std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_SJ: Tensor, end_E: Tensor) -> Tensor:
        """Return each row's product with its expert (S, M), the rows sorted by expert.

        Args:
            x_SJ: the rows.
            end_E: where each expert's rows end, int32.
        """
        if self.linears is not None:
            parts = x_SJ.split(lengths(end_E, len(x_SJ)))
            return torch.cat([layer(part) for layer, part in zip(self.linears, parts, strict=True)])
        y_SM = multiply(x_SJ, self.weight, end_E)
        return y_SM if self.bias is None else y_SM + rows(self.bias, end_E, y_SM)

    def at(self, x_NJ: Tensor, expert: int) -> Tensor:
        """Return the product of rows with one expert (N, M)."""
        if self.linears is not None:
            return self.linears[expert](x_NJ)
        bias = None if self.bias is None else self.bias[expert]
        return F.linear(x_NJ, self.weight[expert], bias)

    def as_linears(self) -> "StackedLinear":
        """Keep each expert in an `nn.Linear` of its own from now on; return this module.

        Libraries that quantize replace linear layers by their type and would pass the stack by.
        Checkpoints of the stack load as before.
        """
        assert self.linears is None
        weight, bias = self.weight.data, None if self.bias is None else self.bias.data
        layers = []
        for expert in range(self.n_expert):
            layer = nn.Linear(
                weight.shape[2], weight.shape[1], bias=bias is not None, device="meta"
            )
            layer.weight = nn.Parameter(weight[expert], self.weight.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias[expert], self.weight.requires_grad)
            layers.append(layer)
        self.weight = self.bias = None
        self.linears = nn.ModuleList(layers)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Split the stack of a checkpoint where this module keeps one layer per expert."""
        if self.linears is not None:
            for name in ("weight", "bias"):
                if (stack := state_dict.pop(f"{prefix}{name}", None)) is not None:
                    for expert, part in enumerate(stack.unbind(0)):
                        state_dict[f"{prefix}linears.{expert}.{name}"] = part
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def multiply(x_SJ: Tensor, weight_EMJ: Tensor, end_E: Tensor) -> Tensor:
    """Return each row's product with its expert's weight (S, M), in the type of `x_SJ`."""
    weight_EMJ = weight_EMJ.to(x_SJ.dtype)
    if can_group(x_SJ, weight_EMJ):
        return grouped_mm(x_SJ, weight_EMJ.transpose(1, 2), end_E)
    # `weight[expert]` would give each expert a gradient of the whole stack; unbind does not.
    parts = zip(x_SJ.split(lengths(end_E, len(x_SJ))), weight_EMJ.unbind(0), strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts])


def rows(value_EM: Tensor, end_E: Tensor, like_SM: Tensor) -> Tensor:
    """Return each row's entry of a table with one row per expert (S, M).

    As a product, because its gradient then is one too: a lookup's gradient adds row by row, all
    rows of an expert to one place.
    """
    row_S1 = torch.arange(len(like_SM), device=end_E.device).unsqueeze(1)
    begin_E = torch.cat([end_E.new_zeros(1), end_E[:-1]])
    mine_SE = (row_S1 >= begin_E) & (row_S1 < end_E)
    return mine_SE.to(like_SM.dtype) @ value_EM.to(like_SM.dtype)


def lengths(end_E: Tensor, n_rows: int) -> list[int]:
    """Return how many rows each expert has; on the meta device, where nobody knows, even shares."""
    if end_E.device.type == "meta":
        share, rest = divmod(n_rows, len(end_E))
        return [share + (expert < rest) for expert in range(len(end_E))]
    return end_E.diff(prepend=end_E.new_zeros(1)).tolist()
