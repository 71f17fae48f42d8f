"""Progress of long work: a bar on a terminal, a plain line now and then anywhere else.

Drawing is tqdm's. What is ours is only the choice between the two and the plain line, so that a log
file stays readable.
"""

import sys
import time
from typing import Any

from tqdm import tqdm

PLAIN_SECONDS = 10.0
"""How often the plain lines come when standard error is not a terminal."""


class Progress:
    """Counts units of work and shows them; a context manager.

    Args:
        total: units in all, or None where unknown.
        desc: what is being done, one or two words.
        unit: the unit, such as "tokens" or "steps".
        initial: units already done before (a resumed run).
        plain_seconds: seconds between plain lines; 0 prints at every update.
    """

    def __init__(
        self,
        total: int | None,
        desc: str,
        unit: str,
        initial: int = 0,
        plain_seconds: float = PLAIN_SECONDS,
    ) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.done = self._initial = initial
        self._figures: dict[str, Any] = {}
        self._plain_seconds = plain_seconds
        self._start = self._last = time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                desc=desc,
                unit=f" {unit}",
                initial=initial,
                unit_scale=True,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def note(self, **figures: Any) -> None:
        """Set the figures shown beside the count, such as `loss="2.31"`."""
        self._figures.update(figures)
        if self._bar is not None:
            self._bar.set_postfix(self._figures, refresh=False)

    def update(self, n: int = 1) -> None:
        """Count `n` more units."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif time.monotonic() - self._last >= self._plain_seconds:
            self._line()

    def say(self, text: str) -> None:
        """Print a line of text without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show the final state."""
        if self._bar is not None:
            self._bar.close()
        elif self.done > self._initial:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        seconds = max(self._last - self._start, 1e-9)
        rate = (self.done - self._initial) / seconds
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        of = f"/{self.total:,}" if self.total else ""
        left = ""
        if self.total and rate > 0 and self.done < self.total:
            left = f", {_clock((self.total - self.done) / rate)} left"
        figures = "".join(f", {key} {value}" for key, value in self._figures.items())
        print(
            f"{self.desc}: {self.done:,}{of} {self.unit}{share}, {_brief(rate)} {self.unit}/s"
            f"{left}{figures}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(total: int | None, desc: str, unit: str, initial: int = 0) -> Progress:
    """Start showing progress; see `Progress`."""
    return Progress(total, desc, unit, initial)


def _brief(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
