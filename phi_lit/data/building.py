"""Making a token store: found if it is there, continued if it was interrupted, else made anew.

A store's directory is named by a hash of everything that decides its bytes (the tokenizer, the
sources with their files' sizes and times, the split), so a change of any of them is another store
and old tokens are never used by mistake. Shards are cut and committed at document boundaries with a
journal beside them; a preparation that is killed goes on from the last commit and ends with the
same bytes. The manifest comes last.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phi_lit.data.encoders import Encoders
from phi_lit.data.shards import OpenShards, Shard, stream_digest, token_dtype
from phi_lit.data.sources import NoText, Source
from phi_lit.data.stream import START, Chunk, DocumentStream, InputChanged, Place
from phi_lit.data.tokens import FORMAT, MANIFEST, SPLITS, VERSION, TokenStore, Verify
from phi_lit.errors import UserError
from phi_lit.files import disk_errors, write_atomic
from phi_lit.progress import progress

SHARD_TOKENS = 1 << 27
"""A commit is due when the open shards hold that many ids: 256 MB in two bytes each."""

JOURNAL = "journal.json"

Say = Callable[[str], None]


def say_on_stderr(text: str) -> None:
    """Print a line of news where it does not mix with a program's output."""
    print(text, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Tell whether this is the first process on its machine: it reads, checks and says it all."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0 or os.environ.get("LOCAL_RANK") == "0"
    return True


def say_once() -> Say:
    """Return what prints a line of news on the first process and says nothing on the others."""
    return say_on_stderr if is_first_process() else lambda text: None


def prepare_store(
    data_dir: Path,
    sources: list[Source],
    tokenizer_dir: Path,
    *,
    val_fraction: float = 0.01,
    split_seed: int = 42,
    num_workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    verify: Verify = "auto",
    say: Say = say_on_stderr,
) -> TokenStore:
    """Return the token store of these sources below `data_dir`, making what is missing of it.

    Args:
        data_dir: holds one directory per store.
        sources: what to read, in order.
        tokenizer_dir: a tokenizer directory that LitGPT reads.
        val_fraction: share of the documents to hold out, above 0 and below 1.
        split_seed: decides which.
        num_workers: cores to tokenize on; None for all. The bytes are the same for any number.
        shard_tokens: ids between two commits.
        verify: how to check a store that is already there (see `TokenStore.open`).
        say: is told in one line which store is used and why a new one is made.

    Raises:
        UserError: a source cannot be trained on, or the disk refuses; no unfinished file is left.
    """
    from phi_lit.data.tokenizer import load_tokenizer

    if not 0 < val_fraction < 1:
        raise UserError(
            f"val_fraction is {val_fraction}; choose more than 0 and less than 1: training needs "
            "held-out documents to measure itself by."
        )
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers is {num_workers}; choose at least 1, or null for all cores.")
    if not -(2**63) <= split_seed < 2**63:
        raise UserError(f"split_seed is {split_seed}; choose a number of at most 63 bits.")
    if not sources:
        raise UserError("no source is given; `stdlib` is the one that is always there.")
    tokenizer = load_tokenizer(tokenizer_dir)
    settings = {
        "tokenizer": tokenizer.fingerprint,
        "sources": [source.describe() for source in sources],
        "val_fraction": val_fraction,
        "split_seed": split_seed,
        "shard_tokens": shard_tokens,
        "version": VERSION,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = data_dir / key
    if os.path.exists(path / MANIFEST):
        return _reuse(path, sources, verify, say)
    say(f"tokens: preparing {path}: {_why_new(data_dir, path, settings)}.")
    for source in sources:
        say(f"  {source.licence_line()}")
        source.check()
    with disk_errors(path), locked(path, say):
        if (path / MANIFEST).exists():  # made by another process while this one waited
            return _reuse(path, sources, verify, say)
        job = _Job(path, sources, settings, token_dtype(tokenizer.vocab_size))
        try:
            encoders = Encoders(tokenizer, job.dtype, num_workers or _cores())
            job.run(encoders, tokenizer, say)
        except BaseException as error:
            job.leave(keep=not isinstance(error, NoText))
            raise
    store = TokenStore.open(path, verify="sizes")
    say(f"tokens: made {path} ({_summary(store)}).")
    _name_commits(store, sources, say)
    return store


@dataclass
class _Journal:
    """What the journal holds: how far the documents are written, and in which shards."""

    place: Place = START
    val_below: int = 0
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {name: [] for name in SPLITS})

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.shards[split])

    @classmethod
    def load(cls, path: Path) -> "_Journal | None":
        """Read a journal, or None where there is none whose shards are all there."""
        try:
            held = json.loads((path / JOURNAL).read_text(encoding="utf-8"))
            shards = {name: [Shard(**s) for s in held["shards"][name]] for name in SPLITS}
            found = cls(Place(*held["place"]), held["val_below"], held["documents"], held["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        found.shards = shards
        files = [path / shard.file for parts in shards.values() for shard in parts]
        return found if all(file.is_file() for file in files) else None


class _Job:
    """One preparation, from wherever the journal says it stands."""

    def __init__(
        self, path: Path, sources: list[Source], settings: dict[str, Any], dtype: np.dtype[Any]
    ) -> None:
        self.path, self.sources, self.settings, self.dtype = path, sources, settings, dtype
        self.done = _Journal()
        self.shards = OpenShards(path, dtype)

    def run(self, encoders: Encoders, tokenizer: Any, say: Say) -> None:
        """Write what is missing, and the manifest."""
        self.done = _Journal.load(self.path) or self._begin(None)
        self._remove_uncommitted()
        if self.done.place != START:
            say(f"  going on after {self.done.place.documents:,} documents of an earlier run")
        with encoders:
            while True:
                try:
                    stream = self._write(encoders)
                except InputChanged:
                    say("  the sources changed since that run: starting over")
                    self._begin(None)
                    continue
                if all(self.done.documents.values()):
                    break
                self._begin(self._other_threshold(stream))
        self._write_manifest(stream, tokenizer)

    def leave(self, keep: bool) -> None:
        """Remove what is not committed, and all of it unless there are commits to keep."""
        self.shards.discard()
        if (self.path / MANIFEST).exists():  # it is finished
            return
        committed = _Journal.load(self.path)  # not self.done: it may be ahead of the journal
        if keep and committed is not None:
            self.done = committed
            with contextlib.suppress(OSError):  # the next run tries again
                self._remove_uncommitted()
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def _begin(self, val_below: int | None) -> _Journal:
        """Forget what is there and start with the first document."""
        if val_below is None:
            val_below = int(self.settings["val_fraction"] * 2**64)
        self.done = _Journal(val_below=val_below)
        self.shards.discard()
        self._remove_uncommitted()
        return self.done

    def _other_threshold(self, stream: DocumentStream) -> int:
        """Return a threshold that gives both splits a document, after one of them got none."""
        if stream.lowest == stream.highest:
            raise NoText(
                "the corpus is a single document, which cannot be split into training and "
                "validation; split its file into several or add a source."
            )
        return stream.highest if self.done.documents["val"] else stream.lowest + 1

    def _remove_uncommitted(self) -> None:
        known = {shard.file for shards in self.done.shards.values() for shard in shards}
        for found in self.path.iterdir():
            if found.name not in known and (found.name != JOURNAL or not known):
                found.unlink()

    def _write(self, encoders: Encoders) -> DocumentStream:
        stream = DocumentStream(self.sources, self.done.val_below, int(self.settings["split_seed"]))
        waiting: deque[tuple[Chunk, Any]] = deque()
        written = sum(map(self.done.tokens, SPLITS))
        with progress(None, "tokenizing", "tokens", initial=written) as bar:
            for chunk in stream.chunks(self.done.place):
                waiting.append((chunk, encoders.submit(chunk.texts)))
                if len(waiting) > encoders.ahead:
                    bar.update(self._take(*waiting.popleft()))
            while waiting:
                bar.update(self._take(*waiting.popleft()))
        self._commit()
        return stream

    def _take(self, chunk: Chunk, encoded: Any) -> int:
        """Append a chunk's ids to the open shards; commit them if they are full."""
        ids, lengths = encoded.result()
        held = np.array(chunk.held_out)
        sizes = np.array(chunk.sizes)
        for split, mine in (("train", ~held), ("val", held)):
            if mine.any():
                self.shards.append(split, ids if mine.all() else ids[np.repeat(mine, lengths)])
                self.done.documents[split] += int(mine.sum())
                self.done.bytes[split] += int(sizes[mine].sum())
        self.done.place = chunk.end
        if self.shards.tokens >= self.settings["shard_tokens"]:
            self._commit()
        return len(ids)

    def _commit(self) -> None:
        numbers = {split: len(self.done.shards[split]) for split in SPLITS}
        for split, shard in self.shards.commit(numbers).items():
            self.done.shards[split].append(shard)
        write_atomic(self.path / JOURNAL, json.dumps(asdict(self.done)))

    def _write_manifest(self, stream: DocumentStream, tokenizer: Any) -> None:
        done = self.done
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eot_id": tokenizer.eot_id,
            },
            "dtype": self.dtype.name,
            "digest": stream_digest(done.shards),
            "splits": {
                split: {
                    "documents": done.documents[split],
                    "tokens": done.tokens(split),
                    "bytes": done.bytes[split],
                    "shards": [asdict(shard) for shard in done.shards[split]],
                }
                for split in SPLITS
            },
            "sources": stream.reports,
            "duplicates": stream.duplicates,
        }
        write_atomic(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (self.path / JOURNAL).unlink()


def _reuse(path: Path, sources: list[Source], verify: Verify, say: Say) -> TokenStore:
    store = TokenStore.open(path, verify=verify)
    for source, report in zip(sources, store.manifest["sources"], strict=True):
        report |= {"name": source.label, "licence": source.licence}  # they decide no token
    say(f"tokens: using {path} ({_summary(store)}).")
    _name_commits(store, sources, say)
    return store


def _name_commits(store: TokenStore, sources: list[Source], say: Say) -> None:
    """Say which commit the tokens of a hub data set stay at, where none was asked for."""
    for source, report in zip(sources, store.manifest["sources"], strict=True):
        if source.hub is not None and source.revision is None and not os.path.isdir(source.hub):
            say(
                f"  {source.label}: these tokens stay those of commit "
                f"{report['commit'] or '(unknown)'}; set its `revision` to choose one."
            )


def _summary(store: TokenStore) -> str:
    """Say in one line what a store holds, from where, and what was left out."""
    names, skipped = [], 0
    for report in store.manifest["sources"]:
        commit = f" at commit {report['commit'][:10]}" if report["commit"] else ""
        names.append(report["name"] + commit)
        skipped += sum(report["skipped"]["counts"].values())
    train, val = store.tokens("train"), store.tokens("val")
    left_out = f"; {skipped:,} files or rows skipped, see its manifest.json" if skipped else ""
    return f"{train:,} to train on, {val:,} held out, from {', '.join(names)}{left_out}"


def _why_new(data_dir: Path, path: Path, settings: dict[str, Any]) -> str:
    """Say how the store asked for differs from the one there that is most like it."""
    if os.path.exists(path):
        return "an earlier run did not finish it"
    differing: list[tuple[list[str], str]] = []
    for found in sorted(data_dir.glob(f"*/{MANIFEST}")):
        try:
            old = TokenStore.open(found.parent, verify="sizes").manifest["settings"]
        except UserError:
            continue  # not usable, so not a candidate; whoever asks for it is told why
        changed = [name for name in settings if old.get(name) != settings[name]]
        differing.append((changed, found.parent.name))
    if not differing:
        return "no store is there yet"
    changed, nearest = min(differing, key=lambda pair: len(pair[0]))
    return f"{' and '.join(changed)} differ{'s' if len(changed) == 1 else ''} from {nearest}"


@contextlib.contextmanager
def locked(path: Path, say: Say) -> Iterator[None]:
    """Hold the directory (made if missing) against other processes that prepare the same store."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        directory = os.open(path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"  another process is preparing {path}: waiting for it")
                fcntl.flock(directory, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.ENOSYS):
                    raise
                say(f"  this file system has no locks: prepare {path} from one process only")
            if path.exists() and os.path.samestat(os.fstat(directory), os.stat(path)):
                yield
                return
        finally:
            os.close(directory)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
