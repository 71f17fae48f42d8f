"""bitsandbytes on CPU too, and for stacked experts: the plugin in the place of Lightning's.

`--quantize bnb.*` makes LitGPT build a `BitsandbytesPrecision`. On a GPU ours is Lightning's own;
on a CPU, which Lightning refuses although bitsandbytes (from 0.49) has kernels for it, weights are
quantized one by one as they are loaded, so that no unquantized copy of the model is ever whole in
memory. As in Lightning every `nn.Linear` is quantized, the head included, and embeddings and norms
are not. A module that keeps several matrices in one parameter (experts) offers `as_linears()`.
"""

import logging
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from types import ModuleType
from typing import Any

import lightning.fabric.plugins.precision.bitsandbytes as fabric_bitsandbytes
import torch
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.plugins.precision.utils import (
    _ClassReplacementContextManager,
    _convert_fp_tensor,
    _DtypeContextManager,
)
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from phi_lit.errors import UserError, did_you_mean

MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
"""What `--quantize bnb.MODE` may name; LitGPT's finetune commands add int8-training."""

OUTLIER = 6.0
"""Activations from here on are multiplied unquantized in int8 (LLM.int8(), arXiv 2208.07339)."""


BLOCK = 64
"""Weights of a 4-bit layer that share a scale (bitsandbytes' own choice)."""

PIECE = 1 << 18
"""Weights quantized at a time: a multiple of `BLOCK`."""


class BitsandbytesPrecision(Precision):
    """What LitGPT calls by Lightning's name: Lightning's own on a GPU, `OnCPU` anywhere else.

    Args:
        mode: one of `MODES`, or int8-training on a GPU.
        dtype: what the layers compute in.
        ignore_modules: names of submodules to leave alone, as in Lightning.

    Raises:
        UserError: bitsandbytes is missing, or the mode is unknown or needs a GPU.
    """

    def __new__(cls, mode: str, *_: Any, **__: Any) -> "BitsandbytesPrecision":
        """Choose the device's class; both are instances of this one."""
        check_mode(mode)
        import_bitsandbytes()
        return super().__new__(OnGPU if torch.cuda.is_available() else OnCPU)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Quantize the linear layers of a model that was built elsewhere, unless they are."""
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if (split := _split(child)) is not None:
                    setattr(parent, name, split)
        return self._convert_linears(module)

    def module_init_context(self) -> AbstractContextManager:
        """Return the context in which a model is built: its linear layers come out quantized."""
        stack = ExitStack()
        stack.enter_context(self._replaced_linears())
        stack.callback(register_module_module_registration_hook(_split_stacked).remove)
        return stack

    def _convert_linears(self, module: nn.Module) -> nn.Module:
        raise NotImplementedError

    def _replaced_linears(self) -> AbstractContextManager:
        raise NotImplementedError


class OnGPU(BitsandbytesPrecision, fabric_bitsandbytes.BitsandbytesPrecision):
    """Lightning's plugin unchanged, with stacked experts split first."""

    def _convert_linears(self, module: nn.Module) -> nn.Module:
        return fabric_bitsandbytes.BitsandbytesPrecision.convert_module(self, module)

    def _replaced_linears(self) -> AbstractContextManager:
        return fabric_bitsandbytes.BitsandbytesPrecision.module_init_context(self)


class OnCPU(BitsandbytesPrecision):
    """The same for a CPU, where layers are quantized as they are loaded."""

    def __init__(
        self,
        mode: str,
        dtype: torch.dtype | None = None,
        ignore_modules: set[str] | None = None,
    ) -> None:
        if mode not in MODES:
            raise UserError(
                f"bnb.{mode} needs a GPU: it keeps 16-bit weights, which saves a CPU nothing. "
                "Quantize with bnb.nf4 here."
            )
        self.dtype = dtype or torch.bfloat16
        self.ignore_modules = ignore_modules or set()
        self._linear = cpu_linear(mode, self.dtype)

    def _convert_linears(self, module: nn.Module) -> nn.Module:
        if not any(isinstance(m, OnLoad) for m in module.modules()):
            _convert(module, self._linear, self.ignore_modules)
        return module

    def _replaced_linears(self) -> AbstractContextManager:
        stack = ExitStack()
        stack.enter_context(self.tensor_init_context())
        stack.enter_context(_ClassReplacementContextManager({"torch.nn.Linear": self._linear}))
        return stack

    def tensor_init_context(self) -> AbstractContextManager:
        """Return the context in which tensors come out in the compute type."""
        return _DtypeContextManager(self.dtype)

    forward_context = tensor_init_context

    def convert_input(self, data: Any) -> Any:
        """Return `data` with its floating-point tensors in the compute type."""
        return apply_to_collection(data, Tensor, _convert_fp_tensor, dst_type=self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Return `data` with its floating-point tensors in torch's default type."""
        default = torch.get_default_dtype()
        return apply_to_collection(data, Tensor, _convert_fp_tensor, dst_type=default)


def check_mode(mode: str) -> None:
    """Raise a `UserError` if bitsandbytes has no such mode."""
    known = (*MODES, "int8-training")
    if mode not in known:
        near = did_you_mean(f"bnb.{mode}", [f"bnb.{name}" for name in known])
        raise UserError(
            f"bnb.{mode} is not a way to quantize.{near} "
            f"Known are {', '.join(f'bnb.{name}' for name in MODES)}."
        )


@cache
def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes without the lines that it prints at every start and every call.

    Raises:
        UserError: it is missing or too old to run on this machine's device.
    """

    def is_news(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "inputs will be cast from" not in text and "kernels-community" not in text

    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(is_news)
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            "--quantize bnb.* takes bitsandbytes: pip install 'phi-lit[quantize]'"
        ) from None
    if not torch.cuda.is_available() and not hasattr(bitsandbytes.functional, "has_avx512bf16"):
        raise UserError(
            f"bitsandbytes {bitsandbytes.__version__} runs on GPUs only; "
            "on a CPU take 0.49.2 or newer: pip install --upgrade bitsandbytes"
        )
    return bitsandbytes


class OnLoad(nn.Module):
    """A linear layer whose weight is quantized when a checkpoint is loaded into it.

    Until then its weight is memory that nobody has written to, which takes no room.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter

    def quantize_(self, weight: Tensor) -> None:
        """Put a quantized copy of `weight` (out_features, in_features) in this layer's place."""
        raise NotImplementedError

    def forget_weight(self) -> None:
        """Let go of the weight: put memory in its place that nobody has written to."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Leave the memory alone: whatever was written here would be loaded over."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        others = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key not in state_dict:
            return
        weight = state_dict[key]
        if tuple(weight.shape) != (self.out_features, self.in_features):
            wanted = (self.out_features, self.in_features)
            error_msgs.append(f"size mismatch for {key}: {tuple(weight.shape)} is not {wanted}.")
            return
        self.quantize_(weight)
        if key in missing_keys:
            missing_keys.remove(key)


@cache
def cpu_linear(mode: str, dtype: torch.dtype) -> type[OnLoad]:
    """Return the class of linear layers that holds `mode` on a CPU and computes in `dtype`."""
    bnb: Any = import_bitsandbytes()
    fast = bnb.functional.has_avx512bf16()

    bits, _, suffix = mode.partition("-")
    nested = suffix == "dq"

    class Linear4bit(OnLoad, bnb.nn.Linear4bit):  # type: ignore[name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            how = {"compute_dtype": dtype, "compress_statistics": nested, "quant_type": bits}
            super().__init__(*args, **kwargs, **how)
            self.forget_weight()
            # the fused kernel takes 32 rows at a time, and blocks of 64 that end with a row
            self.packs = fast and self.out_features % 32 == 0 and self.in_features % 64 == 0

        def forget_weight(self) -> None:
            shape, none = torch.Size((self.out_features, self.in_features)), torch.empty(0)
            state = bnb.functional.QuantState(none, shape=shape, code=none, quant_type=bits)
            codes = torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8, device="cpu")
            self._hold(codes, state)  # LitGPT counts parameters by the state's shape

        def quantize_(self, weight: Tensor) -> None:
            packed, state = _quantize_4bit(weight, bits, nested)
            state.dtype = dtype  # dequantised straight to what is computed in
            self._hold(packed, state)

        def _hold(self, data: Tensor, state: Any) -> None:
            how = {"compress_statistics": nested, "quant_type": bits, "module": self}
            # quantized or not: what moves the layer must not quantize
            self.weight = bnb.nn.Params4bit(
                data, requires_grad=False, quant_state=state, bnb_quantized=True, **how
            )
            self.quant_state = state

        def train(self, mode: bool = True) -> "Linear4bit":
            # a finetuning's samples run in inference mode too, and it goes on training afterwards
            self.packs = self.packs and not mode
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            # packed weights have no gradient: QLoRA's validation must leave them as they are
            self.support_avx512bf16_for_cpu = self.packs and torch.is_inference_mode_enabled()
            return super().forward(x)

    class Linear8bit(OnLoad, bnb.nn.Linear8bitLt):  # type: ignore[name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, has_fp16_weights=False, threshold=OUTLIER)
            self.forget_weight()

        def forget_weight(self) -> None:
            shape = (self.out_features, self.in_features)
            self._hold(torch.empty(shape, dtype=torch.int8, device="cpu"), None)

        def quantize_(self, weight: Tensor) -> None:
            codes = torch.empty(weight.shape, dtype=torch.int8)
            scales, at_once = torch.empty(len(codes)), max(1, PIECE // self.in_features)
            for start in range(0, len(codes), at_once):
                rows = slice(start, start + at_once)
                half = weight.data[rows].half()
                codes[rows], scales[rows], _ = bnb.functional.int8_vectorwise_quant(half)
            self._hold(codes, scales)

        def _hold(self, codes: Tensor, scales: Tensor | None) -> None:
            self.state.CB = self.state.SCB = None
            loaded = {} if scales is None else {"CB": codes, "SCB": scales}
            self.weight = bnb.nn.Int8Params(codes, requires_grad=False, **loaded)

    return Linear8bit if mode == "int8" else Linear4bit


def _quantize_4bit(weight: Tensor, kind: str, nested: bool) -> tuple[Tensor, Any]:
    """Do what bitsandbytes' `quantize_4bit` does, a piece at a time, to the same bits.

    Its CPU path needs up to 28 bytes per weight on the way: three times a whole 4-bit model for
    the head of a large vocabulary.
    """
    functional, numbers = import_bitsandbytes().functional, weight.numel()
    packed = torch.empty((numbers + 1) // 2, 1, dtype=torch.uint8)
    scales, state = torch.empty(-(-numbers // BLOCK)), None
    for start, piece in enumerate(weight.data.reshape(-1).split(PIECE)):
        codes, state = functional.quantize_4bit(piece.float(), quant_type=kind)
        packed[start * PIECE // 2 :][: len(codes)] = codes
        scales[start * PIECE // BLOCK :][: len(state.absmax)] = state.absmax
    assert state is not None
    state.shape, state.absmax = weight.shape, scales
    if nested:
        state.nested, state.offset = True, state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(
            state.absmax - state.offset, blocksize=256
        )
    return packed, state


def _split_stacked(module: nn.Module, name: str, child: nn.Module | None) -> nn.Module | None:
    """Put a module's `as_linears()` in its place as it is given to its parent."""
    split = _split(child)
    for layer in split.modules() if split is not None else ():
        if isinstance(layer, OnLoad):  # until now a slice of the stack, which may go now
            layer.forget_weight()
    return split


def _split(module: nn.Module | None) -> nn.Module | None:
    """Return a module's `as_linears()` if it has one and still keeps a stack."""
    split = getattr(module, "as_linears", None)
    if split is None or module is None or next(module.parameters(recurse=False), None) is None:
        return None
    return split()


def _convert(module: nn.Module, layer: type[OnLoad], ignored: set[str], prefix: str = "") -> None:
    for name, child in list(module.named_children()):
        full = f"{prefix}{name}"
        if type(child) is not nn.Linear:
            _convert(child, layer, ignored, f"{full}.")
        elif not any(full.startswith(other) for other in ignored):
            bias = child.bias is not None
            quantized: Any = layer(child.in_features, child.out_features, bias=bias)
            quantized.quantize_(child.weight.detach())
            quantized.bias = child.bias
            setattr(module, name, quantized)


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, scales of quantized ones included."""
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> None:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    for parameter in model.parameters():
        count(parameter.data)
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for tensor in vars(part).values() if part is not None else ():
                if isinstance(tensor, Tensor):
                    count(tensor)
        if isinstance(scale := getattr(parameter, "SCB", None), Tensor):
            count(scale)
    for module in model.modules():
        if isinstance(scale := getattr(getattr(module, "state", None), "SCB", None), Tensor):
            count(scale)
    for buffer in model.buffers():
        count(buffer)
    return sum(seen.values())
