"""Small LitGPT checkpoints for tests: random weights in which nothing can be lost unnoticed."""

import shutil
from pathlib import Path

import torch
from litgpt import GPT, Config
from litgpt.utils import save_config


def random_model(config: Config, seed: int = 7) -> GPT:
    """Build a model whose biases and norms are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(config).eval()
        torch.nn.init.normal_(model.transformer.wte.weight, std=0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_f" in name:
                mean = 1.0 if name.endswith("weight") else 0.0
                torch.nn.init.normal_(parameter, mean=mean, std=0.1)
    return model


def write_checkpoint(
    directory: Path, tokenizer_dir: Path, config: Config, *, tied: bool = False
) -> GPT:
    """Write a checkpoint directory as LitGPT has them; return the model."""
    model = random_model(config)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    shutil.copytree(tokenizer_dir, directory)
    torch.save(model.state_dict(), directory / "lit_model.pth")
    save_config(config, directory)
    return model


class Bomb:
    """Unpickled without restraint it makes a file: code from a checkpoint has run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def plant(checkpoint: Path, trace: Path) -> None:
    """Put a bomb beside the tensors of a checkpoint file."""
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "bomb": Bomb(trace)}, checkpoint)


def cut_short(path: Path) -> None:
    """Leave the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
