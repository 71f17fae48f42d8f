"""Tokenizing on all cores: text goes out to threads and processes, ids come back in order.

A few threads are enough for a few cores, because the engines let go of Python's lock while they
encode. On many cores the little that needs the lock would hold them up: there, and for a corpus
large enough to pay for their start, worker processes do the work. They are plain `python` children
that load nothing but the tokenizer, over pipes. (A `multiprocessing` pool would import the main
program again in each: with `litgpt` that is seconds of torch before the first token; a fork would
copy its threads' locks.) They end when their pipe does, so a killed parent leaves none behind.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from phi_lit.errors import UserError

if TYPE_CHECKING:
    from phi_lit.data.tokenizer import TextTokenizer

_CHILD = "import sys; sys.path[:] = {path!r}; from phi_lit.data.encoders import work; work()"


class Encoded(NamedTuple):
    """Documents as ids, one after the other with `<|endoftext|>` after each, and their lengths."""

    ids: np.ndarray
    lengths: np.ndarray


def encode_documents(tokenizer: "TextTokenizer", texts: list[str], dtype: np.dtype[Any]) -> Encoded:
    """Encode documents; `lengths` count the `<|endoftext|>` that ends each."""
    parts = tokenizer.encode_batch(texts)
    lengths = np.fromiter((len(part) + 1 for part in parts), np.int64, len(parts))
    ids = np.full(int(lengths.sum()), tokenizer.eot_id, dtype)
    start = 0
    for part, length in zip(parts, lengths.tolist(), strict=True):
        ids[start : start + length - 1] = part
        start += length
    return Encoded(ids, lengths)


class Encoders:
    """Encodes on `workers` threads, each with a process to ask where there is much to do.

    A context manager; `submit` returns a future, and at most `ahead` of them should be left open.
    """

    THREADS_ENOUGH = 4
    """Up to so many workers, no processes are started: Python's lock is free most of the time."""
    WARM_UP = 64
    """Submissions before they are: a smaller corpus is done before they would be ready."""

    def __init__(self, tokenizer: "TextTokenizer", dtype: np.dtype[Any], workers: int) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype
        self.workers = workers
        self.ahead = 2 * workers if workers > 1 else 0
        self._threads = ThreadPoolExecutor(workers, "encode")
        self._starting: list[threading.Thread] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._submitted = 0

    def submit(self, texts: list[str]) -> "Future[Encoded]":
        """Encode documents some time soon."""
        self._submitted += 1
        if self.workers > self.THREADS_ENOUGH and self._submitted == self.WARM_UP:
            for _ in range(self.workers):
                self._start_child()
        return self._threads.submit(self._encode, texts)

    def _encode(self, texts: list[str]) -> Encoded:
        """Encode in a process if one is idle, else in this thread."""
        try:
            child = self._idle.get_nowait()
        except queue.Empty:
            return encode_documents(self._tokenizer, texts, self._dtype)
        answer = _ask(child, texts)
        self._idle.put(child)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start_child(self) -> None:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        self._children.append(child)
        self._starting.append(threading.Thread(target=self._introduce, args=(child,)))
        self._starting[-1].start()

    def _introduce(self, child: "subprocess.Popen[bytes]") -> None:
        """Give a child the tokenizer, and work once it has loaded it."""
        try:
            _ask(child, (self._tokenizer, self._dtype.str))
        except UserError:
            return  # it said why on standard error; threads do its share
        self._idle.put(child)

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None or any(thread.is_alive() for thread in self._starting):
            for child in self._children:
                child.kill()  # what is still on its way is not wanted; its thread gets an EOF
        self._threads.shutdown(cancel_futures=True)
        for thread in self._starting:
            thread.join()
        for child in self._children:
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # unsent text for a child that is gone
                    pipe.close()
            child.wait()


def _ask(child: "subprocess.Popen[bytes]", question: Any) -> Any:
    """Send a child something and wait for its answer."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        pickle.dump(question, child.stdin, pickle.HIGHEST_PROTOCOL)
        child.stdin.flush()
        return pickle.load(child.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"a tokenizing process died (exit status {child.wait()}): most often the system "
            "killed it for memory. Give a smaller num_workers and run the command again."
        ) from error


def work() -> None:
    """Be a child: read lists of texts from standard input, answer with ids, until it ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    try:
        tokenizer, dtype = pickle.load(source)
        pickle.dump(None, answers)
        answers.flush()
        while True:
            texts = pickle.load(source)
            answer: Encoded | Exception
            try:
                answer = encode_documents(tokenizer, texts, np.dtype(dtype))
            except Exception as error:  # raised again in the parent
                answer = error
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError):
        return  # the parent is done, or gone
