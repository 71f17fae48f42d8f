"""All documents of all sources in one fixed order, each with the split it belongs to.

Which documents are held out is decided by a hash of their text, so identical documents always land
on the same side, whatever source they come from. The stream keeps a running hash of what went by:
that is how an interrupted preparation knows that its input is still the same.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import Any, NamedTuple

from phi_lit.data.sources import NoText, Source

CHUNK_BYTES = 1 << 20
"""Text that is sent to a tokenizing process at once (a longer document goes alone)."""

_BITMAP_BYTES = 64 << 20
_PROBES = 4


class SeenBefore:
    """Remembers texts by their hashes in a bitmap of fixed size (a Bloom filter).

    It never misses a repetition; it reports a false one for about one text in 20,000 at 10 million
    texts and one in 300 at 35 million, hence "about" in every report.
    """

    def __init__(self) -> None:
        self._bits = mmap(-1, _BITMAP_BYTES)  # of zeros; pages that are never touched cost nothing

    def add(self, digest: bytes) -> bool:
        """Remember a text by its hash (at least 32 bytes); tell whether it was there."""
        seen = True
        for probe in range(_PROBES):
            bit = int.from_bytes(digest[8 * probe : 8 * probe + 8], "little")
            index, mask = (bit >> 3) % _BITMAP_BYTES, 1 << (bit & 7)
            if not self._bits[index] & mask:
                seen = False
                self._bits[index] |= mask
        return seen


class Place(NamedTuple):
    """A place in the stream: how many documents went by, and a hash of them all."""

    documents: int
    digest: str


START = Place(0, hashlib.sha256().hexdigest())


@dataclass
class Chunk:
    """Documents to encode together; `held_out[i]` sends `texts[i]` to the validation split."""

    texts: list[str]
    held_out: list[bool]
    sizes: list[int]
    end: Place


class InputChanged(Exception):
    """What the stream yields is no longer what an earlier run read."""


class DocumentStream:
    """Reads the sources once; afterwards it knows what it counted.

    Args:
        sources: in order; one with weight w is read ceil(w) times.
        val_below: documents whose split value (64 bits of a hash of the text) is below this are
            held out.
        split_seed: decides the split values.

    Attributes:
        duplicates: documents whose text went by before, about.
        lowest, highest: split values of the documents that were used; equal when they are all the
            same text.
        reports: for each source what it gave and what it skipped.
    """

    def __init__(self, sources: list[Source], val_below: int, split_seed: int) -> None:
        self._sources, self._val_below = sources, val_below
        self._seed = split_seed.to_bytes(8, "little", signed=True)
        self._seen = SeenBefore()
        self._hash = hashlib.sha256()
        self._passed = 0
        self._expected = START
        self.duplicates = 0
        self.lowest, self.highest = 1 << 64, -1
        self.reports: list[dict[str, Any]] = []

    def chunks(self, after: Place = START) -> Iterator[Chunk]:
        """Yield chunks of about a megabyte, from a place that an earlier run reached.

        The documents before it are read again (to count and to compare) but not yielded. Chunks
        begin anew there, so where they are cut depends only on the documents.

        Raises:
            InputChanged: those documents are not what the earlier run read.
            UserError: a source gave nothing.
        """
        self._expected = after
        texts, held_out, sizes, total = list[str](), list[bool](), list[int](), 0
        for text, size, held in self._documents():
            if self._passed <= after.documents:
                continue
            texts.append(text)
            held_out.append(held)
            sizes.append(size)
            total += size
            if total >= CHUNK_BYTES:
                yield Chunk(texts, held_out, sizes, self._place())
                texts, held_out, sizes, total = [], [], [], 0
        if self._passed < after.documents:
            raise InputChanged
        if texts:
            yield Chunk(texts, held_out, sizes, self._place())

    def _place(self) -> Place:
        return Place(self._passed, self._hash.hexdigest())

    def _documents(self) -> Iterator[tuple[str, int, bool]]:
        for source in self._sources:
            report = {"name": source.label, "licence": source.licence, "weight": source.weight}
            documents = size_in_all = 0
            passes = int(-(-source.weight // 1))
            for number in range(passes):
                for document in source.documents():
                    encoded = document.text.encode()
                    digest = hashlib.blake2b(encoded, digest_size=32).digest()
                    self._passed += 1
                    self._hash.update(digest)
                    if self._passed == self._expected.documents and self._place() != self._expected:
                        raise InputChanged
                    if number == 0:
                        documents += 1
                        size_in_all += len(encoded)
                        self.duplicates += self._seen.add(digest)
                    if not belongs(digest, number, source.weight):
                        continue
                    value = self._split_value(digest)
                    self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)
                    held = value < self._val_below
                    if not (held and number):  # a repetition would only weigh the validation loss
                        yield document.text, len(encoded), held
            if not documents:
                raise source.empty()
            report |= {"documents": documents, "bytes": size_in_all, "commit": source.commit}
            self.reports.append({**report, "skipped": source.skipped.report()})
        if self.highest < 0:
            raise NoText(
                "the sources' weights keep no document at all; raise the weight of one of them."
            )

    def _split_value(self, digest: bytes) -> int:
        mixed = hashlib.blake2b(digest, key=self._seed, digest_size=8).digest()
        return int.from_bytes(mixed, "little")


def belongs(digest: bytes, number: int, weight: float) -> bool:
    """Tell whether reading number `number` (from 0) of a source takes this document."""
    whole = int(weight)
    if number < whole:
        return True
    return int.from_bytes(digest[-8:], "little") < (weight - whole) * 2**64
