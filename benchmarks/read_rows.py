"""Rows from disk to batches, side by side: RowLoader, litdata's loader, torch's over a memory map.

    python benchmarks/read_rows.py [--rounds 5] [--json out.json]

Every path deals the same 64 million ids in shuffled rows of 2,049, micro-batches of 8, one epoch a
turn (files in the page cache, as they are after the first epoch). The figure to compare with is not
another loader but the model: phi-1 on one H100 eats some 50,000 tokens a second. For litdata see
text_to_tokens.py; without it, its rows are left out.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import machine, print_header, print_table, write_json

IDS, T, BATCH = 64_000_000, 2048, 8


def write_ids(directory: Path) -> None:
    """Write the ids raw, and for litdata as documents of 10,000."""
    ids = np.random.default_rng(0).integers(0, 50_295, IDS).astype("<u2")
    (directory / "ids.bin").write_bytes(ids.tobytes())
    if importlib.util.find_spec("litdata"):
        from litdata import optimize
        from litdata.streaming import TokensLoader

        optimize(
            fn=Cut(directory / "ids.bin"),
            inputs=list(range(0, IDS, 10_000)),
            output_dir=str(directory / "litdata"),
            num_workers=1,
            chunk_bytes="50MB",
            item_loader=TokensLoader(block_size=T + 1),
        )


class Cut:
    """What litdata asks for a document's ids, by their start."""

    def __init__(self, path: Path) -> None:
        self._ids = np.memmap(path, "<u2", mode="r")

    def __call__(self, start: int) -> Iterable[torch.Tensor]:
        yield torch.from_numpy(self._ids[start : start + 10_000].astype(np.int32))


class Mapped(torch.utils.data.Dataset):  # type: ignore[misc]
    """Rows of a memory map, as many training scripts have them."""

    def __init__(self, path: Path) -> None:
        self._ids = np.memmap(path, "<u2", mode="r")

    def __len__(self) -> int:
        return (len(self._ids) - 1) // T

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self._ids[row * T : row * T + T + 1].astype(np.int64))


def row_loader(directory: Path) -> Iterable[torch.Tensor]:
    from phi_lit.data.rows import RowLoader
    from phi_lit.data.tokens import TokenArray

    tokens = TokenArray([directory / "ids.bin"], [IDS], np.dtype("<u2"))
    return RowLoader(tokens, row_length=T, micro_batch=BATCH, seed=1, endless=False)


def litdata_loader(directory: Path, workers: int) -> Iterable[torch.Tensor]:
    from litdata.streaming import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(
        input_dir=str(directory / "litdata"), item_loader=TokensLoader(T + 1), shuffle=True
    )
    return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=True)


def torch_loader(directory: Path, workers: int) -> Iterable[torch.Tensor]:
    dataset = Mapped(directory / "ids.bin")
    return torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True
    )


CONTESTANTS: dict[str, tuple[Callable[..., Iterable[torch.Tensor]], dict[str, Any]]] = {
    "phi_lit RowLoader": (row_loader, {}),
    "litdata StreamingDataLoader, 4 workers (as LitGPT)": (litdata_loader, {"workers": 4}),
    "litdata StreamingDataLoader, no workers": (litdata_loader, {"workers": 0}),
    "torch DataLoader over a memory map, 2 workers": (torch_loader, {"workers": 2}),
    "torch DataLoader over a memory map, no workers": (torch_loader, {"workers": 0}),
}


def take_turn(name: str, directory: Path) -> None:
    """Be the process of one turn: read two epochs, print the second one's figures as JSON."""
    torch.set_num_threads(1)
    build, options = CONTESTANTS[name]
    loader = build(directory, **options)
    for _ in range(2):
        rows, began = 0, time.perf_counter()
        for batch in loader:
            rows += len(batch)
        seconds = time.perf_counter() - began
    print(json.dumps({"rows": rows, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns for each path")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--turn", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        take_turn(arguments.turn, arguments.directory)
        return
    about = machine(1)
    print_header("Rows to batches", about)
    has_litdata = importlib.util.find_spec("litdata") is not None
    names = [name for name in CONTESTANTS if has_litdata or not name.startswith("litdata")]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        write_ids(Path(scratch))
        for _ in range(arguments.rounds):
            for name in names:
                command = [sys.executable, __file__, "--turn", name, "--directory", scratch]
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ
                )
                found = json.loads(done.stdout.splitlines()[-1])
                rates[name].append(found["rows"] / found["seconds"])
    middle = {name: statistics.median(values) for name, values in rates.items()}
    rows = []
    for name in names:
        ratios = [a / b for a, b in zip(rates[names[0]], rates[name], strict=True)]
        rows.append((name, middle[name], middle[name] * T, 1 / statistics.median(ratios)))
    print_table(("loader", "rows/s", "tokens/s", "times RowLoader"), rows)
    write_json(arguments.json, {"machine": about, "rows_per_second": rates})


if __name__ == "__main__":
    main()
