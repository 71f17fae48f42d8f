"""From tokens to text while they come: characters that span tokens, and stop strings.

A token may end in the middle of a character, and a stop string may begin in one token and end in
another. Text is therefore given out only as far as no later token can change it, and a stop string
is looked for in the text, never among tokens: what stands before it is kept to the letter.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

UNFINISHED = "\ufffd"
"""What decoders put in the place of bytes that are no character, or not yet one."""

CONTEXT = 6
"""Tokens of the prompt that are decoded with the completion: some tokenizers (LLaMA's) drop the
first word's leading space, and a completion's first word is not the first."""


class TextStream:
    """Turns tokens into text one by one.

    Args:
        decode: from a list of ids to text.
        context: the prompt's ids.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context[-CONTEXT:])
        self._seen = 0  # ids before this are no longer needed to decode what follows
        self._given = len(self._ids)  # ids whose text has been given out
        self._known = decode(self._ids) if self._ids else ""

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now and was not before (perhaps none)."""
        self._ids.append(token)
        text = self._decode(self._ids[self._seen :])
        if len(text) <= len(self._known) or text.endswith(UNFINISHED):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """Return what is left, unfinished characters as U+FFFD: no token follows."""
        return self._give(self._decode(self._ids[self._seen :]))

    def _give(self, text: str) -> str:
        new = text[len(self._known) :]
        self._seen, self._given = self._given, len(self._ids)
        self._known = self._decode(self._ids[self._seen :])
        return new


def whole_text(decode: Decode, context: Sequence[int], ids: list[int]) -> str:
    """Return at once what a `TextStream` gives piece by piece."""
    before = list(context[-CONTEXT:])
    return decode(before + ids)[len(decode(before)) if before else 0 :]


class StopText:
    """The text of one completion, watched for stop strings.

    Args:
        stream: where its text comes from.
        stops: the strings; the one that begins first ends the text, before its first letter.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str]) -> None:
        self.text = ""
        self._stream, self._stops = stream, stops
        self._reach = max(map(len, stops), default=1) - 1

    def push(self, token: int) -> bool:
        """Add a token; tell whether a stop string is complete. Then `text` ends before it."""
        return self._add(self._stream.push(token))

    def flush(self) -> bool:
        """Add what is left of the stream; tell whether a stop string is complete."""
        return self._add(self._stream.flush())

    def _add(self, new: str) -> bool:
        if not new:
            return False
        start = max(0, len(self.text) - self._reach)  # a stop string may begin in the old text
        self.text += new
        found = [at for stop in self._stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)
