"""The token store: one long array of ids per split, on disk, checked, and never in memory.

The paper's layout: documents one after the other with `<|endoftext|>` after each, no document mask.
On disk it is raw little-endian uint16 (uint32 where the vocabulary needs it), cut into shards
(`shards.py`) at document boundaries, beside a `manifest.json` that is written last: a directory
without one is not a store. How a store is made is in `building.py`; how rows are cut from it in
`rows.py`.
"""

import json
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from phi_lit.data.shards import Shard, sha256_of, take_samples
from phi_lit.errors import UserError

if TYPE_CHECKING:
    from phi_lit.data.sources import Source

MANIFEST = "manifest.json"
FORMAT, VERSION = "phi_lit token store", 1
SPLITS = ("train", "val")
FULL_CHECK_BYTES = 512 << 20
"""Up to this size `verify="auto"` reads a whole store; above, only the samples."""

Verify = Literal["auto", "full", "sizes"]


class TokenArray:
    """A split as one array of ids, memory-mapped: `len`, and slices or rows as NumPy arrays."""

    def __init__(self, paths: list[Path], lengths: list[int], dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._parts = [
            np.memmap(path, dtype, mode="r", shape=(length,)) if length else np.empty(0, dtype)
            for path, length in zip(paths, lengths, strict=True)
        ]
        self._starts = [0, *accumulate(lengths)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("a TokenArray is sliced without a step")
        out = np.empty(max(stop - start, 0), self.dtype)
        self.read(start, out)
        return out

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (one-dimensional, any integer type) with the ids from position `start` on."""
        part = bisect_right(self._starts, start) - 1
        done = 0
        while done < len(out):
            offset = start + done - self._starts[part]
            piece = self._parts[part][offset : offset + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            part += 1


class TokenStore:
    """An opened store: its manifest and its two splits. See `open` and `build`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def build(
        cls,
        data_dir: Path,
        sources: "list[Source]",
        tokenizer_dir: Path,
        **settings: Any,
    ) -> "TokenStore":
        """Return the store of these sources below `data_dir`, made first if it is not there.

        The settings are those of `phi_lit.data.building.prepare_store`.
        """
        from phi_lit.data.building import prepare_store

        return prepare_store(data_dir, sources, tokenizer_dir, **settings)

    @classmethod
    def open(cls, path: Path, *, verify: Verify = "auto") -> "TokenStore":
        """Open a prepared store.

        Args:
            path: the directory with `manifest.json`.
            verify: `sizes` looks at the files' sizes, `full` also reads them and compares their
                sha256, `auto` does so up to 512 MB and above compares 16 samples of each file.

        Raises:
            UserError: it is not a finished store, or a shard is missing, cut short or not the one
                that was written; the message names it.
        """
        store = cls(path, _read_manifest(path))
        store._check(verify)
        return store

    def split(self, name: str) -> TokenArray:
        """Return the array of ids of `train` or `val`."""
        shards = self.shards(name)
        return TokenArray(
            [self.path / shard.file for shard in shards],
            [shard.tokens for shard in shards],
            self.dtype,
        )

    def shards(self, split: str) -> list[Shard]:
        """Return the files of a split in order."""
        return [Shard(**shard) for shard in self.manifest["splits"][split]["shards"]]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type of the ids."""
        return np.dtype(self.manifest["dtype"]).newbyteorder("<")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id the tokenizer can give."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def eot_id(self) -> int:
        """The token that ends a document."""
        return int(self.manifest["tokenizer"]["eot_id"])

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the tokenizer that made the ids."""
        return str(self.manifest["tokenizer"]["fingerprint"])

    @cached_property
    def digest(self) -> str:
        """One hash over both token streams: equal digests mean equal training data."""
        return str(self.manifest["digest"])

    def tokens(self, split: str) -> int:
        """Return how many ids a split holds, `<|endoftext|>` included."""
        return int(self.manifest["splits"][split]["tokens"])

    def _check(self, verify: Verify) -> None:
        itemsize = self.dtype.itemsize
        shards = [shard for split in SPLITS for shard in self.shards(split)]
        total = sum(shard.tokens for shard in shards) * itemsize
        full = verify == "full" or (verify == "auto" and total <= FULL_CHECK_BYTES)
        for shard in shards:
            path = self.path / shard.file
            try:
                wrong = _fault(path, shard, shard.tokens * itemsize, verify, full)
            except OSError as error:
                wrong = f"cannot be read ({error.strerror})"
            if wrong:
                raise _damaged(path, wrong)


def _fault(path: Path, shard: Shard, expected: int, verify: Verify, full: bool) -> str | None:
    """Return what is wrong with a shard's file, which should have `expected` bytes."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected:
        return f"holds {size:,} bytes instead of {expected:,}"
    with open(path, "rb"):
        pass  # it can be read, whether or not it is now
    if full and sha256_of(path) != shard.sha256:
        return "is not the file that was written: its sha256 differs"
    if verify == "auto" and not full and take_samples(path, size) != shard.samples:
        return "is not the file that was written: a sample of it differs"
    return None


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is not a finished token store: it has no {MANIFEST}. Make one with "
            "`phi-lit prepare`, or run the same command again if it was interrupted."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}. Delete {path} to prepare anew.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file} is not the manifest of a token store.")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('version')}; this phi_lit reads {VERSION}. "
            "Prepare it anew, or use the phi_lit that made it."
        )
    try:
        _look_through(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is damaged: {type(error).__name__} {error}. Restore it from where you copied "
            f"it, or delete {path} to prepare anew."
        ) from None
    return manifest


def _look_through(manifest: dict[str, Any]) -> None:
    """Raise a KeyError, TypeError or ValueError unless everything that is ever read is there."""
    np.dtype(manifest["dtype"])
    manifest["digest"], manifest["duplicates"]
    dict(manifest["settings"])
    tokenizer = manifest["tokenizer"]
    tokenizer["fingerprint"], int(tokenizer["vocab_size"]), int(tokenizer["eot_id"])
    for split in SPLITS:
        held = manifest["splits"][split]
        int(held["documents"]), int(held["tokens"]), int(held["bytes"])
        for shard in held["shards"]:
            int(Shard(**shard).tokens)
    for report in manifest["sources"]:
        for key in ("name", "licence", "weight", "commit", "documents", "bytes"):
            report[key]
        dict(report["skipped"]["counts"]), list(report["skipped"]["examples"])


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"token shard {path} {what}. Restore it from where you copied it, or delete "
        f"{path.parent} to prepare anew."
    )
