"""The contestants of `gpu.py`: ours, stock LitGPT and transformers, each as it trains by itself.

Every builder returns (ids, targets -> loss) and the module whose parameters train.
"""

from collections.abc import Callable
from typing import Any

from one_gpu.cases import Case


def build_ours(case: Case, config: Any, fabric: Any) -> tuple[Any, Any]:
    """Return (ids, targets -> loss) and the parameters' module, as our training loop sets it up."""
    import torch
    from litgpt.model import GPT

    from phi_lit.train.checkpointing import apply_activation_checkpointing
    from phi_lit.train.dropout import apply_dropout
    from phi_lit.train.init import initialize
    from phi_lit.train.model import LossModel, compile_blocks

    with torch.device(fabric.device):
        gpt = GPT(config)
    initialize(gpt, "normal")
    if case.fp8:
        use_float8(gpt.transformer.h)  # the head stays in bf16: it decides the loss
    apply_dropout(gpt, attention=case.dropout, residual=case.dropout)
    apply_activation_checkpointing(gpt, case.checkpointing)  # type: ignore[arg-type]
    if case.compile:
        compile_blocks(gpt, dynamic=False)
    model = LossModel(gpt)
    cosine, sine = gpt.cos, gpt.sin
    module = fabric.setup_module(model)
    gpt.cos, gpt.sin = cosine.to(fabric.device), sine.to(fabric.device)  # stay float32
    return module, module


def use_float8(blocks: Any) -> None:
    """Let the linear layers multiply in float8: by torchao where it is installed, or by ours."""
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        from _float8 import convert_to_float8_training
    convert_to_float8_training(blocks)


def build_litgpt(case: Case, config: Any, fabric: Any) -> tuple[Any, Any]:
    """Return the same for stock LitGPT, as its `pretrain` sets it up."""
    import torch
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    from phi_lit.train.init import initialize

    with torch.device(fabric.device):
        gpt = GPT(config)
    initialize(gpt, "normal")
    model = torch.compile(gpt, dynamic=False) if case.compile else gpt
    module = fabric.setup_module(model)
    return lambda ids, targets: chunked_cross_entropy(module(ids), targets), module


def build_transformers(case: Case, config: Any, fabric: Any) -> tuple[Any, Any]:
    """Return the same for transformers' PhiForCausalLM with its own loss."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    phi = PhiConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        max_position_embeddings=config.block_size,
        partial_rotary_factor=config.rotary_percentage,
        attention_dropout=case.dropout,
        resid_pdrop=case.dropout,
        use_cache=False,
        attn_implementation=case.attention,
    )
    with torch.device(fabric.device):
        model = PhiForCausalLM(phi)
    model.train()
    if case.compile:
        model.compile(dynamic=False)

    class LossOnly(torch.nn.Module):  # or Fabric would copy the logits to float32 on their way out
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, targets: Any) -> Any:
            # `shift_labels` are targets already in their places, as ours are.
            return self.model(input_ids=ids, labels=targets, shift_labels=targets).loss

    module = fabric.setup_module(LossOnly())
    return module, module


BUILDERS: dict[str, Callable[[Case, Any, Any], tuple[Any, Any]]] = {
    "ours": build_ours,
    "litgpt": build_litgpt,
    "transformers": build_transformers,
}
