r"""GPT-2's kind of tokenizer in tiktoken's engine: the ids of `tokenizers`, some ten times faster.

The kind is byte-level BPE split by GPT-2's pattern, with runs of spaces or tabs as added tokens or
none: codegen's tokenizer and the small ones that `phi-lit tokenizer train` makes. Two things have
to be equal for the ids to be.

**The split.** `tokenizers` takes the added runs out of the text first (the leftmost, then the
longest) and splits what lies between them by GPT-2's pattern

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

which sees the end of the text at the end of such a segment. One pattern does the same in one pass:
runs of 2 to 31 spaces (2 to 9 tabs) are a piece of their own, and the two alternatives for other
white space stop before two spaces or two tabs. No other alternative can swallow a part of a run: it
takes one space at most, and only when something that is no space follows. At a segment's end
`(?!\S)` holds in both, there because the segment ends and here because a run begins with white
space. All alternatives without a look-ahead stand in one group, which the regex engine then runs as
one automaton instead of trying them one by one: twice the speed.

**The merges.** `tokenizers` merges the pairs in its list, tiktoken any two neighbours whose joined
bytes are a token. Both take the pair of lowest rank first, then the leftmost. Let each token t be
made by one merge (a, b) only, ranked after the merges that make a and b, and let t alone encode to
t. Then merges run in order of rank, since what a merge makes only takes part in later ones, and t
alone stands as [a, b] when all merges ranked before its own are done. Now let tiktoken, having done
the same as `tokenizers` so far, be about to join two neighbours that spell t. When all merges
ranked before t's were done, none had crossed the ends of t, so those inside it were those of t
alone, and it stood as [a, b]. Whatever was merged since would have come after joining these two, so
the neighbours are a and b, which is a pair in the list. By induction both do the same merges.
`_check_merges` verifies the conditions for every token when loading.

`tests/data/test_tiktoken_engine.py` compares the ids over the standard library, random Unicode and
every code point; `_check_texts` compares some nasty ones at every load.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from phi_lit.data.engines import TokenizersEngine, without_surrogates
from phi_lit.data.vocabulary import byte_of_char, covers_bytes, merge_pairs

OLDEST = (0, 14)
"""tiktoken before 0.13 takes quadratic time on long words; 0.13 panics on long white space."""

Runs = dict[str, dict[int, int]]
"""The id of each added run: by its character, then by its length."""


class UnsuitedError(Exception):
    """tiktoken's engine can't be trusted with this tokenizer; the message says why."""


class TiktokenEngine:
    """tiktoken's engine with the ids of a tokenizer.json.

    Args:
        settings: the tokenizer.json.
        reference: the same tokenizer in `tokenizers`, which also takes the texts that tiktoken's
            regular expressions give up on (half a million white-space characters in a row).
        dtype: of the ids.

    Raises:
        UnsuitedError: the tokenizer is of another kind, or a check found a difference.
    """

    name = "tiktoken"

    def __init__(
        self, settings: dict[str, Any], reference: TokenizersEngine, dtype: np.dtype
    ) -> None:
        _check_kind(settings)
        runs = whitespace_runs(settings, reference)
        merges = merge_pairs(settings["model"])
        tokens = _check_merges(merges, reference, runs)
        ranks, id_of_rank = _ranks(tokens, settings["model"]["vocab"], runs)
        pattern = split_pattern({char: max(ids) for char, ids in runs.items()})
        self._encoding = _encoding(pattern, ranks)
        self._id_of_rank = np.array(id_of_rank, dtype=dtype)
        self._reference = reference
        _check_classes(pattern)
        _check_texts(self, reference)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text."""
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(without_surrogates(text))
        except ValueError:  # the regular expression's stack is full
            return self._reference.encode(text)
        return self._id_of_rank[ranks]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, special tokens written out."""
        return self._reference.decode(ids)


def whitespace_runs(settings: dict[str, Any], reference: TokenizersEngine) -> Runs:
    """Return the added tokens that are runs of spaces or tabs: `{" ": {2: 50286, ...}, ...}`.

    Raises:
        UnsuitedError: an ordinary added token is anything else, or a run's length is left out.
    """
    runs: Runs = {}
    normalized: dict[str, set[bool]] = {}
    for token in settings.get("added_tokens") or []:
        content = token["content"]
        if token.get("special"):
            if " " in content or "\t" in content:
                raise UnsuitedError(f"the special token {content!r} holds white space")
            continue
        if set(content) not in ({" "}, {"\t"}):
            raise UnsuitedError(f"the added token {content!r} is no run of spaces or tabs")
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise UnsuitedError(f"the added token {content!r} takes its surroundings")
        runs.setdefault(content[0], {})[len(content)] = reference.tokenizer.token_to_id(content)
        normalized.setdefault(content[0], set()).add(bool(token.get("normalized")))
    for char, ids in runs.items():
        if sorted(ids) != list(range(2, max(ids) + 1)):
            raise UnsuitedError(f"the added runs of {char!r} are not of all lengths from 2 on")
        if len(normalized[char]) > 1:
            raise UnsuitedError(f"the added runs of {char!r} are found in two passes")
    return runs


def split_pattern(longest: dict[str, int]) -> str:
    r"""Return the regular expression that cuts a text into pieces as `tokenizers` does.

    Args:
        longest: the length of the longest added run of each character; empty gives GPT-2's split.
    """
    runs = "".join(f"|{re.escape(char)}{{2,{length}}}" for char, length in longest.items())
    begins_run = "|".join(f"{re.escape(char)}{{2}}" for char in longest)
    space = rf"(?:(?!{begins_run})\s)" if longest else r"\s"
    plain = rf"(?:'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+{runs})"
    return rf"{plain}|{space}+(?!\S)|\s"


def _check_kind(settings: dict[str, Any]) -> None:
    model, split = settings["model"], settings.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE" or not covers_bytes(model):
        raise UnsuitedError("it is no byte-level BPE")
    departures = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    for key in departures:
        if model.get(key):
            raise UnsuitedError(f"its model sets {key}")
    if settings.get("normalizer") is not None:
        raise UnsuitedError("it normalizes the text first")
    if (
        split.get("type") != "ByteLevel"
        or split.get("add_prefix_space", True)
        or not split.get("use_regex", True)
    ):
        raise UnsuitedError("it does not split text as GPT-2 does")


def _check_merges(merges: list[list[str]], reference: TokenizersEngine, runs: Runs) -> list[str]:
    """Return the merged tokens in order, having verified what the argument above needs of them.

    Tokens that hold an added run are left out: runs are cut out of the text before merging, so no
    piece ever spells such a token, and a run's own bytes are needed for the added token.
    """
    rank_of = {left + right: rank for rank, (left, right) in enumerate(merges)}
    if len(rank_of) < len(merges):
        raise UnsuitedError("two of its merges make the same token")
    for rank, (left, right) in enumerate(merges):
        if rank_of.get(left, -1) > rank or rank_of.get(right, -1) > rank:
            raise UnsuitedError(f"its merge {left!r} {right!r} comes before its parts")
    written = {byte: char for char, byte in byte_of_char().items()}
    doubled = re.compile("|".join(re.escape(written[ord(char)]) * 2 for char in runs) or r"(?!)")
    tokens = [token for token in rank_of if not doubled.search(token)]
    alone = reference.tokenizer.model.tokenize
    for token in tokens:
        if len(alone(token)) != 1:
            raise UnsuitedError(f"its token {token!r} alone does not encode to itself")
    return tokens


def _ranks(
    merged: list[str], vocab: dict[str, int], runs: Runs
) -> tuple[dict[bytes, int], list[int]]:
    """Return tiktoken's ranks (bytes, then merges in order, then runs) and the id of each rank."""
    alphabet = byte_of_char()
    latin = str.maketrans({char: chr(byte) for char, byte in alphabet.items()})
    id_of = {token.translate(latin).encode("latin-1"): vocab[token] for token in alphabet}
    id_of |= {token.translate(latin).encode("latin-1"): vocab[token] for token in merged}
    for char, ids in runs.items():
        id_of |= {char.encode() * length: i for length, i in ids.items()}
    return {token: rank for rank, token in enumerate(id_of)}, list(id_of.values())


def _encoding(pattern: str, ranks: dict[bytes, int]) -> Any:
    """Return a tiktoken Encoding.

    It names a special token because tiktoken searches texts for special tokens, and with none at
    all the search matches everywhere. It is never asked for, so text that spells it stays text.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise UnsuitedError("tiktoken is not installed") from error
    version = tuple(int(part) for part in re.findall(r"\d+", tiktoken.__version__)[:2])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UnsuitedError(f"tiktoken is {tiktoken.__version__}, older than {oldest}")
    return tiktoken.Encoding(
        "phi_lit",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={"<|never asked for|>": len(ranks)},
    )


_LETTERS_OF_EACH_UNICODE = (
    "\u0d54\U00010c80\U0001e900\U00011d00\U00010d00\U00010fe0\U00010e80\U00030000\U00010570"
    "\U00011f04\U00031350\U0002ebf0\U000105c0\U00010940\U000323b0"
)  # 8.0 to 17.0
_NUMBERS_OF_EACH_UNICODE = "\U000118e0\U0001e950\U00010d30\U0001fbf0\U00011f50\U0001ccf0\U00011de0"
_DOUBTFUL_SPACES = (
    "\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2000\u200b\u2028\u202f\u205f\u2060\u3000\ufeff"
)


def _check_classes(pattern: str) -> None:
    """Verify that both libraries know the same letters, numbers and spaces.

    They carry Unicode tables of their own, which could be of different versions. The tokenizers
    compared here join every high byte to an `a`, `1` or `!` before it, so that the ids show where
    the pieces begin.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = byte_of_char()
    merges = [(left, char) for left in "a1!" for char, byte in alphabet.items() if byte > 127]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    reference = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ranks = {bytes(alphabet[char] for char in token): i for i, token in enumerate(tokens)}
    ours = _encoding(pattern, ranks)
    for char in _LETTERS_OF_EACH_UNICODE + _NUMBERS_OF_EACH_UNICODE + _DOUBTFUL_SPACES:
        text = f"a{char}1{char}!{char}"
        if ours.encode_ordinary(text) != reference.encode(text).ids:
            raise UnsuitedError(f"tiktoken and tokenizers disagree on what U+{ord(char):04X} is")


NASTY = (
    "",
    " ",
    "\n",
    "\t",
    "def f(x):\n    return x  # it's\n\n\n\nclass A:\n\tdef g(self):\n\t\tpass\n",
    "x" + " " * 31 + "y" + " " * 32 + "z" + " " * 33 + "\n" + " " * 64 + "w" + " " * 70,
    "\t" * 9 + "a" + "\t" * 10 + "b" + "\t" * 19 + " " + "\t" * 2 + "  \t \t\t  \t",
    "\n \n  \n   \n    \n\t\n\t\t\n \t\n\t \n  \t\t\n\r\n  \r\n\r\n \r\n   x",
    "a \n b\n\n c \n\n  d\n \n \n   e\x0b\x0c  \x85 \xa0\xa0  \u3000\u2003 f",
    "<|endoftext|>a<|endoftext|><|endoftext|> <|never asked for|>",
    "I'll they're we've he'd I'm it's don't 'S 'LL 'tis ''' '' ' 's",
    "0123456789 1 23 456 ½ ² Ⅷ ١٢٣ x1y22 3.14e-10 0x_ff 1_000",
    "naïve Ωmega Привет こんにちは 안녕 שלום مرحبا हिन्दी ไทย e\u0301 \u200d\u200b\ufeff",
    "🌍👨\u200d👩\u200d👧\U0001f3fd ☺\ufe0f \U0001f1ea\U0001f1f8 \U0010ffff",
    "\x00\x01\x1c\x1c \x1f\x7f\ufffd\x85",
    "========  ########\n\"\"\"'''###...!!!???+-*/ ->=>==!=:=**//  @#$%^&*()[]{}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 20,
    "zyxwvutsrqponmlkjihgfedcba_ABC__DEF___ghi" * 20,
)
"""Texts that have told wrong engines from right ones."""


def _check_texts(engine: TiktokenEngine, reference: TokenizersEngine) -> None:
    for text in NASTY:
        if not np.array_equal(engine.encode(text), reference.encode(text)):
            raise UnsuitedError(f"its ids differ on {text[:40]!r}")
