"""Tokenizing on all cores: text goes out to worker processes, ids come back in order.

The workers are plain `python` children that load nothing but the tokenizer, over pipes. (A
`multiprocessing` pool would import the main program again in each: with `litgpt` that is seconds of
torch before the first token; a fork would copy its threads' locks.) They end when their pipe does,
so a killed parent leaves none behind.
"""

import os
import pickle
import queue
import subprocess
import sys
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
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
    """Encodes in `processes` children, and in this process until the first of them is ready.

    A small corpus is done before a child would have loaded its tokenizer, so none is started before
    `WARM_UP` submissions; with one process none ever is. A context manager; `submit` returns a
    future, and at most `ahead` of them should be left open.
    """

    WARM_UP = 4

    def __init__(self, tokenizer: "TextTokenizer", dtype: np.dtype[Any], processes: int) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype
        self.processes = processes
        self.ahead = 2 * processes if processes > 1 else 0
        self._threads = ThreadPoolExecutor(max(processes, 1), "encode")
        self._children: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self._starts: list[Future[None]] = []
        self._submitted = 0

    def submit(self, texts: list[str]) -> "Future[Encoded]":
        """Encode documents some time soon."""
        self._submitted += 1
        if self.processes > 1 and self._submitted == self.WARM_UP:
            self._starts = [self._threads.submit(self._start) for _ in range(self.processes)]
        if any([start.result() is None for start in self._starts if start.done()]):
            return self._threads.submit(self._ask_child, texts)
        future: Future[Encoded] = Future()
        future.set_result(encode_documents(self._tokenizer, texts, self._dtype))
        return future

    def _start(self) -> None:
        """Start a child and wait until it has loaded the tokenizer."""
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        self._children.append(child)
        _ask(child, (self._tokenizer, self._dtype.str))
        self._idle.put(child)

    def _ask_child(self, texts: list[str]) -> Encoded:
        child = self._idle.get()
        if child is None:
            raise CancelledError
        answer = _ask(child, texts)
        self._idle.put(child)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            for child in self._children:
                child.kill()  # what is still on its way is not wanted; its thread gets an EOF
            for _ in range(self.processes):
                self._idle.put(None)  # and a thread that waits for a child gets this
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # unsent text for a child that is gone
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
