"""Models with random weights that are far from uniform, so that equal means equal."""

import torch
from litgpt import GPT, Config


def random_gpt(config: Config, seed: int = 0) -> GPT:
    """Build a model whose logits differ by whole units, not by rounding errors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gpt = GPT(config)
        for parameter in gpt.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        gpt.lm_head.weight.data.mul_(4)
    return gpt.eval()
