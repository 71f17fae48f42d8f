"""The golden loss curve: phi1-test on fixed text, float32, one thread, one seed.

`make golden` rewrites golden.csv; its diff is reviewed like code. The text is made here from
numbers, so that it does not change with Python's version, and only arithmetic can move the curve.
"""

import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # run as a module, pytest's paths are not there

from runs import RECIPE, losses, merged, pretrain

CSV = Path(__file__).with_name("golden.csv")


def write_text(root: Path) -> None:
    """Write 40 small made-up functions, and a byte tokenizer with the GPT-2 alphabet."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    (root / "text").mkdir(parents=True)
    for number in range(40):
        lines = [f"def f{number}(x):", f"    y = x * {number * number}"]
        lines += [f"    y += {number} % {k + 2}" for k in range(number % 5 + 1)]
        (root / "text" / f"{number:02}.py").write_text("\n".join([*lines, "    return y", ""]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    (root / "tokenizer").mkdir()
    tokenizer.save(str(root / "tokenizer" / "tokenizer.json"))
    (root / "tokenizer" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    )


def train_golden(root: Path) -> list[float]:
    """Train the golden run in an empty directory; returns its losses."""
    torch.set_num_threads(1)
    write_text(root)
    changes: dict[str, Any] = {
        "out_dir": str(root / "out"),
        "tokenizer_dir": str(root / "tokenizer"),
        "train": {"max_steps": 20, "save_interval": 20},
        "eval": {"interval": 20},
    }
    arguments = merged(RECIPE, changes)
    arguments["data"]["init_args"] |= {
        "sources": [str(root / "text")],
        "data_dir": str(root / "tokens"),
    }
    pretrain(arguments)
    return losses(root / "out")


def read_golden() -> list[float]:
    """Return the kept curve."""
    with open(CSV, newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        found = train_golden(Path(directory))
    with open(CSV, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "loss"])
        writer.writerows((step, f"{loss:.6f}") for step, loss in enumerate(found, 1))
    print(f"{CSV}: {len(found)} steps, from {found[0]:.4f} to {found[-1]:.4f}")
