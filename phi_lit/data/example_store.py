"""Examples as ids on disk: encoded once, memory-mapped, each with the length of its question.

Encoding is LitGPT's own, in batches: `[bos] question` as it will be asked in `litgpt chat`, then
the answer and the end-of-text token. The store's directory is named by a hash of everything that
decides its bytes. It is written in parts that are whole or not there, so that a preparation that is
killed goes on from its last part; the manifest comes last. Which examples are held out, cut or left
out is decided when it is read (`supervised.py`).
"""

import hashlib
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer

from phi_lit.data.building import Say, locked, say_on_stderr
from phi_lit.data.engines import id_type
from phi_lit.data.examples import Example, ExampleSource
from phi_lit.data.stream import belongs
from phi_lit.errors import UserError
from phi_lit.files import staged_dir, write_atomic
from phi_lit.progress import progress

MANIFEST = "examples.json"
VERSION = 1
PART_TOKENS = 1 << 25
"""A part is written when it holds that many ids."""
BATCH = 1024
"""Examples that are encoded together."""


class Encoder:
    """Examples to ids, with LitGPT's tokenizer and prompt style.

    Args:
        tokenizer: LitGPT's.
        style: what is put around a question.

    Raises:
        UserError: the tokenizer has no end-of-text token, or no token to begin with where it says
            that there is one.
    """

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle) -> None:
        self._tokenizer, self._style = tokenizer, style
        if tokenizer.eos_id is None or tokenizer.eos_id < 0:
            raise UserError(
                f"the tokenizer of {tokenizer.model_name} has no end-of-text token, by which an "
                "answer ends; name it as eos_token in its tokenizer_config.json."
            )
        if tokenizer.use_bos and tokenizer.bos_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer.model_name} is to begin with a bos token but names "
                "none; add bos_token to its tokenizer_config.json, or add_bos_token: false."
            )
        self._answers = tokenizer.processor
        if tokenizer.backend == "huggingface":
            # An answer that spells <|endoftext|> is text like any other: it ends nowhere early.
            self._answers = type(tokenizer.processor).from_str(tokenizer.processor.to_str())
            self._answers.encode_special_tokens = True
            self._answers.no_padding()
            self._answers.no_truncation()
        self.vocab_size = _room(tokenizer)
        self.dtype = id_type(self.vocab_size)

    def fingerprint(self) -> str:
        """Return a hash of what decides the ids: the tokenizer and the prompt style."""
        tokenizer, style = self._tokenizer, self._style
        if tokenizer.backend == "huggingface":
            vocabulary = tokenizer.processor.to_str().encode()
        else:
            vocabulary = tokenizer.processor.serialized_model_proto()
        probes = [style.apply("question"), style.apply("question", sys_prompt="system")]
        ends = [tokenizer.use_bos, tokenizer.bos_id, tokenizer.eos_id]
        facts = json.dumps([hashlib.sha256(vocabulary).hexdigest(), ends, probes])
        return hashlib.sha256(facts.encode()).hexdigest()

    def encode(self, examples: list[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of every question (in the prompt style) and answer.

        Raises:
            UserError: an example has a system message that the prompt style leaves out.
        """
        prompts = [self.prompt(example) for example in examples]
        asked = self._batch(self._tokenizer.processor, prompts)
        answered = self._batch(self._answers, [example.answer for example in examples])
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        pairs = []
        for question, answer in zip(asked, answered, strict=True):
            # The processor may have put these ends there by itself.
            question = question[1:] if question[:1] == [bos] else question
            question = question[:-1] if question[-1:] == [eos] else question
            answer = answer[1:] if answer[:1] == [bos] else answer
            question = [bos, *question] if self._tokenizer.use_bos else question
            answer = answer if answer[-1:] == [eos] else [*answer, eos]
            pairs.append((np.array(question, self.dtype), np.array(answer, self.dtype)))
        return pairs

    def prompt(self, example: Example) -> str:
        """Return an example's question as the model is asked it."""
        asked = self._style.apply(example.prompt, sys_prompt=example.system or None)
        if example.system and example.system not in asked:
            raise UserError(
                f"{example.id} has a system message, and the prompt style "
                f"{type(self._style).__name__} has no place for it; choose another prompt_style "
                "(freewilly2, llama3 and smollm2 have one), or name no `system` column."
            )
        return asked

    def _batch(self, processor: Any, texts: list[str]) -> list[list[int]]:
        if self._tokenizer.backend == "huggingface":
            return [encoding.ids for encoding in processor.encode_batch(texts)]
        return processor.encode(texts)


def _room(tokenizer: Tokenizer) -> int:
    """Return the highest id + 1, added tokens included."""
    if tokenizer.backend == "huggingface":
        return max(tokenizer.processor.get_vocab(with_added_tokens=True).values()) + 1
    return tokenizer.processor.vocab_size()


class Part(NamedTuple):
    """A stretch of examples, one after the other."""

    ids: np.ndarray
    """Question and answer of each, flat."""
    lengths: np.ndarray
    """(examples, 2): ids of question and answer."""
    hashes: np.ndarray
    """(examples,) uint64 of the text: equal texts are held out together."""


class ExampleStore:
    """Encoded examples, opened: ids are read where they are asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        parts = [_read_part(path / name) for name in manifest["parts"]]
        self.lengths = np.concatenate([part.lengths for part in parts]).astype(np.int64)
        """(examples, 2): ids of question (with what begins a text) and answer (with its end)."""
        self.hashes = np.concatenate([part.hashes for part in parts])
        """(examples,) uint64."""
        self.starts = np.concatenate([[0], self.lengths.sum(1).cumsum()])
        """Where each example begins among all ids; the last entry is their number."""
        self._ids = [part.ids for part in parts]
        self._part_starts = np.concatenate([[0], np.cumsum([len(ids) for ids in self._ids])])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id the tokenizer can give."""
        return int(self.manifest["vocab_size"])

    def read(self, start: int, length: int) -> np.ndarray:
        """Return some ids of one example, as int64; `start` counts among all ids."""
        part = int(np.searchsorted(self._part_starts, start, "right")) - 1
        offset = start - int(self._part_starts[part])
        return self._ids[part][offset : offset + length].astype(np.int64)


def prepare_examples(
    data_dir: Path,
    sources: list[ExampleSource],
    encoder: Encoder,
    *,
    part_tokens: int = PART_TOKENS,
    say: Say = say_on_stderr,
) -> ExampleStore:
    """Return the store of these sources' examples below `data_dir`, making what is missing of it.

    Raises:
        UserError: a source cannot be learned from, or the disk refuses.
    """
    if not sources:
        raise UserError("no source is given; `stdlib` is the one that is always there.")
    settings = {
        "encoding": encoder.fingerprint(),
        "sources": [source.describe() for source in sources],
        "part_tokens": part_tokens,
        "version": VERSION,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = data_dir / key
    if not (path / MANIFEST).is_file():
        for source in sources:
            say(f"  {source.licence_line()}")
            source.check()
        with locked(path, say):
            if not (path / MANIFEST).is_file():  # made by another process while this one waited
                _Making(path, sources, encoder, part_tokens, say).run(settings)
    store = open_examples(path)
    names = ", ".join(source.label for source in sources)
    skipped = sum(sum(each["skipped"]["counts"].values()) for each in store.manifest["sources"])
    left_out = f"; {skipped:,} rows skipped, see its {MANIFEST}" if skipped else ""
    say(f"examples: using {path} ({len(store):,} from {names}{left_out}).")
    return store


def open_examples(path: Path) -> ExampleStore:
    """Open a prepared store of examples.

    Raises:
        UserError: it is not finished, or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        store = ExampleStore(path, manifest)
        whole = int(store.starts[-1]) == manifest["ids"] == int(store._part_starts[-1])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the prepared examples in {path} cannot be read ({error}); delete it to prepare anew."
        ) from None
    if not whole:
        raise UserError(f"the prepared examples in {path} are cut short; delete it.")
    return store


class _Making:
    """One preparation, from wherever earlier ones left it."""

    def __init__(
        self,
        path: Path,
        sources: list[ExampleSource],
        encoder: Encoder,
        part_tokens: int,
        say: Say,
    ) -> None:
        self.path, self.sources, self.encoder = path, sources, encoder
        self.part_tokens, self.say = part_tokens, say
        self.hash = hashlib.sha256()
        self.reports: list[dict[str, Any]] = []

    def run(self, settings: dict[str, Any]) -> None:
        """Write what is missing, and the manifest."""
        names = self._earlier()
        passed, digest = self._place(names)
        if passed:
            self.say(f"  going on after {passed:,} examples of an earlier run")
        stream = self._stream()
        for _ in islice(stream, passed):
            pass
        if passed and self.hash.hexdigest() != digest:
            raise UserError(
                f"the sources changed since {self.path} was begun; delete it to prepare anew."
            )
        with progress(None, "encoding", "examples", initial=passed) as bar:
            for part in self._parts(stream, bar):
                name = f"part-{len(names):05d}"
                passed += len(part.lengths)
                self._write(name, part, passed)
                names.append(name)
        if not passed:
            raise self.sources[0].empty()
        manifest = {
            "settings": settings,
            "vocab_size": self.encoder.vocab_size,
            "parts": names,
            "ids": sum(int(np.load(self.path / name / "lengths.npy").sum()) for name in names),
            "digest": self.hash.hexdigest(),
            "sources": self.reports,
        }
        write_atomic(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    def _earlier(self) -> list[str]:
        names: list[str] = []
        while (self.path / f"part-{len(names):05d}").is_dir():
            names.append(f"part-{len(names):05d}")
        return names

    def _place(self, names: list[str]) -> tuple[int, str]:
        """Return how many examples the parts hold, and the hash of their texts."""
        if not names:
            return 0, ""
        place = json.loads((self.path / names[-1] / "place.json").read_text())
        return place["examples"], place["digest"]

    def _stream(self) -> Iterator[tuple[Example, int]]:
        """Yield every example with the hash of its text, and report on the sources."""
        for source in self.sources:
            for number in range(math.ceil(source.weight)):
                count = doctests = 0
                for example in source.examples():
                    doctests += example.has_doctest
                    text = "\0".join([example.system, example.prompt, example.answer]).encode()
                    digest = hashlib.blake2b(text, digest_size=32).digest()
                    self.hash.update(digest)
                    count += 1
                    if belongs(digest, number, source.weight):
                        yield example, int.from_bytes(digest[:8], "little")
                if not count:
                    raise source.empty()
            self.reports.append(
                {
                    "name": source.label,
                    "licence": source.licence,
                    "commit": source.commit,
                    "examples": count,
                    "with_doctest": doctests,
                    "skipped": source.skipped.report(),
                }
            )

    def _parts(self, stream: Iterator[tuple[Example, int]], bar: Any) -> Iterator[Part]:
        ids: list[np.ndarray] = []
        lengths, hashes, total = list[list[int]](), list[int](), 0
        while batch := list(islice(stream, BATCH)):
            for pair in self.encoder.encode([example for example, _ in batch]):
                ids += pair
                lengths.append([len(part) for part in pair])
                total += sum(lengths[-1])
            hashes += [value for _, value in batch]
            bar.update(len(batch))
            if total >= self.part_tokens:
                yield _part(ids, lengths, hashes)
                ids, lengths, hashes, total = [], [], [], 0
        if lengths:
            yield _part(ids, lengths, hashes)

    def _write(self, name: str, part: Part, passed: int) -> None:
        with staged_dir(self.path / name) as directory:
            for field, array in part._asdict().items():
                np.save(directory / f"{field}.npy", array)
            place = {"examples": passed, "digest": self.hash.hexdigest()}
            (directory / "place.json").write_text(json.dumps(place))


def _part(ids: list[np.ndarray], lengths: list[list[int]], hashes: list[int]) -> Part:
    return Part(np.concatenate(ids), np.array(lengths, np.int32), np.array(hashes, np.uint64))


def _read_part(directory: Path) -> Part:
    ids, lengths, hashes = (
        np.load(directory / f"{name}.npy", mmap_mode="r" if name == "ids" else None)
        for name in Part._fields
    )
    return Part(ids, lengths, hashes)
