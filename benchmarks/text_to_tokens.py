"""Text to tokens on disk, side by side: LitGPT's TextFiles, datasets.map, tokenizers, phi_lit.

    python benchmarks/text_to_tokens.py [--rounds 3] [--json out.json]

Same text (Python's whole standard library, tests included), same tokenizer (codegen's), all cores
for everybody (LitGPT leaves one out by itself, so it is there twice). Every turn is a process of
its own, timed from after its imports (the tokenizer is loaded inside the time) until the ids are on
the disk; all turns of a round follow one another, and ratios are medians over rounds. That all
paths give the same ids, document by document, is checked after every turn. Then the memory of the
whole process tree, on this corpus and on one ten times larger.

LitGPT's TextFiles needs litdata, and litdata asks for torchvision, which it does not need here and
which breaks LitGPT next to a CPU build of torch. Without torchvision, and only for this benchmark:

    pip install --no-deps --target LITDATA litdata boto3 botocore s3transfer jmespath obstore \
        tifffile python-dateutil six
    PYTHONPATH=LITDATA python benchmarks/text_to_tokens.py

Where litdata is missing, its place is taken by what LitGPT itself contributes (Tokenizer.encode,
file by file, in as many processes, ids written as they are), labelled as such: it flatters LitGPT.
"""

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _measure import machine, print_header, print_table, write_json

BLOCK = 2049
"""The paper's rows: 2,048 tokens and the target of the last."""

EOT = 50256


def write_corpus(directory: Path, copies: int) -> int:
    """Write the library's files as stripped .txt, `copies` times; return the bytes."""
    directory.mkdir(parents=True)
    library = Path(sysconfig.get_path("stdlib"))
    total = number = 0
    for copy in range(copies):
        for path in sorted(library.rglob("*.py")):
            if {"site-packages", "dist-packages"} & set(path.parts):
                continue
            try:
                text = path.read_bytes().decode().replace("\r", "").strip()
            except UnicodeDecodeError:
                continue
            if text and not text.startswith("\ufeff"):
                text = f"# copy {copy}\n{text}" if copy else text
                (directory / f"{number:06}.txt").write_text(text, encoding="utf-8")
                total += len(text.encode())
                number += 1
    return total


# ----------------------------------------------------------------------------------- contestants
# Each takes (files, tokenizer directory, output directory, processes) and returns when the ids are
# on the disk. Imports that only one of them needs are made before its clock starts, by `prepare_*`.


def litgpt_as_it_is(files: list[str], tokenizer: Path, out: Path, processes: int) -> None:
    """What TextFiles.prepare_data does: it leaves one core out."""
    litgpt_all_cores(files, tokenizer, out, max(processes - 1, 1))


def litgpt_all_cores(files: list[str], tokenizer: Path, out: Path, processes: int) -> None:
    """The same with all cores."""
    from litdata import optimize
    from litdata.streaming import TokensLoader
    from litgpt.data.text_files import tokenize
    from litgpt.tokenizer import Tokenizer

    optimize(
        fn=partial(tokenize, tokenizer=Tokenizer(tokenizer)),
        inputs=files,
        output_dir=str(out),
        num_workers=processes,
        chunk_bytes="50MB",
        item_loader=TokensLoader(block_size=BLOCK),
    )


def _litgpt_part(tokenizer: Path, out: Path, numbered: tuple[int, list[str]]) -> None:
    from litgpt.data.text_files import tokenize
    from litgpt.tokenizer import Tokenizer

    number, files = numbered
    opened = Tokenizer(tokenizer)
    with open(out / f"{number}.int32", "wb") as file:
        for name in files:
            for ids in tokenize(name, opened):
                file.write(ids.numpy().tobytes())


def litgpt_encode(files: list[str], tokenizer: Path, out: Path, processes: int) -> None:
    """LitGPT's own part of that path: its Tokenizer, file by file."""
    out.mkdir()
    parts = [(number, files[number::processes]) for number in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(partial(_litgpt_part, tokenizer, out), parts)


def datasets_map(files: list[str], tokenizer: Path, out: Path, processes: int) -> None:
    """The transformers examples' way: map(tokenize), map(group into blocks)."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    opened = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = opened(batch["text"], return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*document, EOT] for document in ids]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [i for document in batch["input_ids"] for i in document]
        return {"input_ids": [joined[i : i + BLOCK] for i in range(0, len(joined), BLOCK)]}

    settings: dict[str, Any] = {"batched": True, "num_proc": processes}
    read = datasets.load_dataset(
        "text", data_files=files, sample_by="document", split="train", cache_dir=str(out / "cache")
    )
    encoded = read.map(encode, remove_columns=["text"], **settings)
    encoded.map(group, **settings).save_to_disk(out / "grouped")


def tokenizers_batch(files: list[str], tokenizer: Path, out: Path, processes: int) -> None:
    """`tokenizers` by itself: encode_batch on all its threads, appended to one uint16 file."""
    from tokenizers import Tokenizer

    out.mkdir()
    opened = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    with open(out / "ids.uint16", "wb") as file:
        for start in range(0, len(files), 256):
            texts = [Path(name).read_text(encoding="utf-8") for name in files[start : start + 256]]
            for encoded in opened.encode_batch_fast(texts, add_special_tokens=False):
                file.write(np.array([*encoded.ids, EOT], np.uint16).tobytes())


def phi_lit(files: list[str], tokenizer: Path, out: Path, processes: int) -> None:
    """Ours, with all that it does: listing, split, hashes, checksums, syncing, manifest."""
    from phi_lit.data.sources import open_source
    from phi_lit.data.tokens import TokenStore

    TokenStore.build(
        out, [open_source(str(Path(files[0]).parent))], tokenizer, num_workers=processes
    )


CONTESTANTS: dict[str, Callable[[list[str], Path, Path, int], None]] = {
    "LitGPT TextFiles (litdata)": litgpt_as_it_is,
    "LitGPT TextFiles (litdata), given all cores": litgpt_all_cores,
    "LitGPT Tokenizer.encode (no litdata here)": litgpt_encode,
    "datasets.map + group": datasets_map,
    "tokenizers encode_batch -> uint16": tokenizers_batch,
    "phi_lit": phi_lit,
}

IMPORTS = {
    "LitGPT TextFiles (litdata)": ["litdata", "litgpt.data.text_files"],
    "LitGPT TextFiles (litdata), given all cores": ["litdata", "litgpt.data.text_files"],
    "LitGPT Tokenizer.encode (no litdata here)": ["litgpt.data.text_files"],
    "datasets.map + group": ["datasets", "transformers"],
    "tokenizers encode_batch -> uint16": ["tokenizers"],
    "phi_lit": ["phi_lit.data.building", "phi_lit.data.tokenizer"],
}


# ------------------------------------------------------------------------------------ what came


def written(name: str, out: Path) -> Iterator[np.ndarray]:
    """Yield the pieces of what a contestant wrote, documents separated by EOT."""
    if "(litdata)" in name:
        for path in sorted(out.glob("*.bin")):
            content = path.read_bytes()
            items = int(np.frombuffer(content, "<u4", 1)[0])
            offsets = np.frombuffer(content, "<u4", items + 1, offset=4)
            yield np.frombuffer(content[offsets[0] : offsets[-1]], "<i4")
    elif name.startswith("LitGPT"):
        for path in sorted(out.glob("*.int32")):
            yield np.fromfile(path, "<i4")
    elif name.startswith("datasets"):
        import datasets

        blocks = datasets.load_from_disk(out / "grouped")["input_ids"]
        yield np.concatenate([np.array(block) for block in blocks])
    elif name.startswith("tokenizers"):
        yield np.fromfile(out / "ids.uint16", "<u2")
    else:
        for path in sorted(out.glob("*/*.bin")):
            yield np.fromfile(path, "<u2")


def summary(name: str, out: Path) -> tuple[int, str]:
    """Return the number of ids (separators included) and a hash of the documents in any order."""
    total, documents = 0, []
    for ids in written(name, out):
        total += len(ids)
        for document in np.split(ids, np.flatnonzero(ids == EOT)):
            document = document[document != EOT].astype("<u4")
            if len(document):
                documents.append(hashlib.sha256(document.tobytes()).digest())
    return total, hashlib.sha256(b"".join(sorted(documents))).hexdigest()[:16]


# -------------------------------------------------------------------------------------- measuring


def take_turn(arguments: argparse.Namespace) -> None:
    """Be the process of one turn: print the seconds as JSON on the last line."""
    import importlib

    for module in IMPORTS[arguments.turn]:
        importlib.import_module(module)
    files = sorted(str(path) for path in arguments.corpus.glob("*.txt"))
    began = time.perf_counter()
    CONTESTANTS[arguments.turn](files, arguments.tokenizer, arguments.out, arguments.processes)
    print(json.dumps({"seconds": time.perf_counter() - began}))


def run_turn(
    name: str, corpus: Path, tokenizer: Path, out: Path, processes: int
) -> tuple[float, float]:
    """Run one turn; return its seconds and the peak MB resident in its process tree."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--turn", name, "--corpus", str(corpus)]
    command += ["--tokenizer", str(tokenizer), "--out", str(out), "--processes", str(processes)]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(out.parent / "hf"),
        "DATA_OPTIMIZER_CACHE_FOLDER": str(out.parent / "litdata"),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    tree, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        resident = 0
        try:
            for member in [tree, *tree.children(recursive=True)]:
                resident += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        peak = max(peak, resident)
        time.sleep(0.02)
    said, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} failed:\n{errors}")
    return json.loads(said.splitlines()[-1])["seconds"], peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns for each path")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", help="only the paths with these words in their names")
    parser.add_argument("--no-memory", action="store_true", help="leave out the larger corpus")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--turn", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    for name in ("--corpus", "--tokenizer", "--out"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        take_turn(arguments)
        return
    names = [n for n in CONTESTANTS if not arguments.only or any(w in n for w in arguments.only)]
    absent = "no litdata" if importlib.util.find_spec("litdata") else "(litdata)"
    names = [name for name in names if absent not in name]
    with tempfile.TemporaryDirectory() as scratch:
        compare(names, Path(scratch), arguments)


def compare(names: list[str], scratch: Path, arguments: argparse.Namespace) -> None:
    from phi_lit.data.tokenizer import build_codegen

    about = machine(arguments.processes)
    print_header("Text to tokens", about)
    tokenizer = scratch / "tokenizer"
    build_codegen(tokenizer)
    size = write_corpus(scratch / "corpus", 1)
    times: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, float] = {}
    found: dict[str, tuple[int, str]] = {}
    for number in range(arguments.rounds):
        for name in names:
            seconds, peak = run_turn(
                name, scratch / "corpus", tokenizer, scratch / "out", arguments.processes
            )
            times[name].append(seconds)
            memory[name] = max(memory.get(name, 0), peak)
            found[name] = summary(name, scratch / "out")
            print(f"  round {number + 1}: {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
    hashes = {digest for _, digest in found.values()}
    if len(hashes) > 1:
        raise SystemExit(f"the ids differ: {found}")
    tokens = found[names[-1]][0]
    peers = [name for name in names if name == names[0] or name.startswith("datasets")]
    rows = []
    for name in names:
        ratios = [
            statistics.median(b / t for b, t in zip(times[peer], times[name], strict=True))
            for peer in peers
        ]
        rows.append((name, tokens / statistics.median(times[name]), *ratios, memory[name]))
    print(f"\n{size / 1e6:.1f} MB of text, {tokens:,} tokens; all paths gave the same ids")
    ratio_columns = [f"times {peer}" for peer in peers]
    print_table(("path", "tokens/s", *ratio_columns, "peak MB, all processes"), rows)
    large = {}
    if "phi_lit" in names and not arguments.no_memory:
        larger = write_corpus(scratch / "larger", 10)
        _, large["MB"] = run_turn(
            "phi_lit", scratch / "larger", tokenizer, scratch / "out", arguments.processes
        )
        large["bytes"] = larger
        print(
            f"\nphi_lit on {size / 1e6:.0f} MB of text: at most {memory['phi_lit']:.0f} MB "
            f"resident in all processes; on {larger / 1e6:.0f} MB: {large['MB']:.0f} MB"
        )
    write_json(
        arguments.json,
        {
            "machine": about,
            "bytes": size,
            "tokens": tokens,
            "seconds": times,
            "peak_mb": memory,
            "larger_corpus": large,
        },
    )


if __name__ == "__main__":
    main()
