"""Whether a checkpoint has its experts where the model has them; a clear line where it has not."""

from typing import TYPE_CHECKING, Any

from torch import nn

from extensions.phi_moe.errors import MoEError

if TYPE_CHECKING:
    from extensions.phi_moe.settings import Settings

_WORDS = {
    "dense": "an MLP without experts",
    "instead": "experts instead of the MLP",
    "after": "experts after the MLP",
}


def check_layout(block: nn.Module, block_idx: int, settings: "Settings", kind: str) -> None:
    """Make `block` refuse weights of another layout before any is loaded.

    Args:
        block: LitGPT's, with its experts in place.
        block_idx: the layer's number, for the sentence.
        settings: of the model.
        kind: what the layer has: "dense", "instead" or "after".
    """

    def hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        found = _kind({name[len(prefix) :] for name in state_dict if name.startswith(prefix)})
        if found not in (None, kind):
            raise MoEError(
                f"layer {block_idx} of the checkpoint has {_WORDS[found]}, the model has "
                f"{_WORDS[kind]} (hf_config.moe: placement {settings.placement}, every "
                f"{settings.every}). Take the model_config.yaml that lies beside the checkpoint, "
                "or turn a dense checkpoint into experts first (phi-lit upcycle)"
            )

    block.register_load_state_dict_pre_hook(hook)


def _kind(names: set[str]) -> str | None:
    """Return what a layer with these tensors has, or None where nothing can be told."""
    if any(name.startswith("moe.experts.") for name in names):
        return "after"
    if any(name.startswith("mlp.experts.") for name in names):
        return "instead"
    if any(name.startswith(("mlp.fc", "mlp.proj")) for name in names):
        return "dense"
    return None
