"""Six novels by Jane Austen as text files, a chapter each, for studies that must run offline.

Project Gutenberg's texts come inside the R package janeaustenr (MIT, Julia Silge), which Debian
carries: `apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb austen`. No R is
needed: `pip install rdata` reads its data.

    python benchmarks/novels.py austen data/austen

The chapters are documents of their own, so that a share of them can be held out.
"""

import argparse
import re
import struct
import warnings
import zlib
from itertools import pairwise
from pathlib import Path

BOOKS = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}

CHAPTER = re.compile(r"chapter [ivxlc\d]+\.?", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="where dpkg -x unpacked r-cran-janeaustenr")
    parser.add_argument("out_dir", type=Path, help="gets a directory per novel and the licence")
    arguments = parser.parse_args()
    written = write_novels(arguments.package, arguments.out_dir)
    size = sum(path.stat().st_size for path in written)
    print(f"{arguments.out_dir}: {len(written)} chapters, {size / 1e6:.2f} MB")


def write_novels(package: Path, out_dir: Path) -> list[Path]:
    """Write every chapter of the novels and the package's licence; returns the chapters."""
    written = []
    for name, lines in read_novels(package).items():
        directory = out_dir / BOOKS[name].lower().replace(" ", "-")
        directory.mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(chapters(lines)):
            path = directory / f"{number:02}.txt"
            path.write_text(text, encoding="utf-8")
            written.append(path)
    licence = find(package, "copyright").read_bytes()
    (out_dir / "LICENCE").write_bytes(licence)  # no suffix: never read as text to train on
    return written


def read_novels(package: Path) -> dict[str, list[str]]:
    """Return the lines of each novel from R's database of the package's data.

    Rdata.rdx is an index of (offset, length) into Rdata.rdb, which holds R's serialized objects,
    each as four bytes of its uncompressed length and a zlib stream.
    """
    import rdata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Unknown file type": an object without a file's header
        index = rdata.read_rds(find(package, "Rdata.rdx"))["variables"]
        database = find(package, "Rdata.rdb").read_bytes()
        novels = {}
        for name, (offset, length) in index.items():
            (size,) = struct.unpack(">I", database[offset : offset + 4])
            content = zlib.decompress(database[offset + 4 : offset + length])
            assert len(content) == size, f"{name} is damaged"
            lines = rdata.conversion.convert(rdata.parser.parse_data(content))
            novels[str(name)] = [str(line) for line in lines]
    return novels


def chapters(lines: list[str]) -> list[str]:
    """Cut a novel before every line that is a chapter's heading; the title goes to the first."""
    starts = [number for number, line in enumerate(lines) if CHAPTER.fullmatch(line.strip())]
    bounds = [0, *starts[1:], len(lines)]
    return ["\n".join(lines[first:last]).strip() + "\n" for first, last in pairwise(bounds)]


def find(package: Path, name: str) -> Path:
    """Return the file of that name in the unpacked package."""
    found = sorted(package.rglob(name))
    if not found:
        raise SystemExit(f"{package} holds no {name}: unpack r-cran-janeaustenr there (dpkg -x)")
    return found[0]


if __name__ == "__main__":
    main()
