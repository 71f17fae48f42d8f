"""The loss curve as a PNG: training loss, validation, learning rate, over tokens.

It is drawn from logged rows, those in memory or those in the `metrics.csv` of LitGPT's CSV logger,
and without pyplot: no window system, no global state, safe beside a training loop.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi_lit.errors import UserError
from phi_lit.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[list[float], list[float]]
"""x and y of one line, sorted by x."""

_TRAIN, _VAL, _RATE, _REFERENCE = "#2563ab", "#d1495b", "#4f5d75", "#7a7a7a"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read a `metrics.csv`, or the newest one below a run's directory; empty cells are left out.

    Raises:
        UserError: there is no such file.
    """
    found = [path] if path.is_file() else sorted(path.rglob("metrics.csv"), key=_changed)
    if not found:
        raise UserError(
            f"no metrics.csv at or below {path}. It is written with --logger_name csv; "
            "give that run's out_dir, or the file."
        )
    with found[-1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(cell) for key, cell in row.items() if _is_number(cell)} for row in rows]


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _is_number(cell: str | None) -> bool:
    try:
        float(cell or "")
    except ValueError:
        return False
    return True


def plot_losses(
    rows: Sequence[Mapping[str, Any]] | Path,
    png: Path,
    title: str,
    reference: Mapping[str, float] | None = None,
) -> Path:
    """Draw the loss curve and return `png`, which is written whole or not at all.

    Args:
        rows: logged rows with any of `step`, `tokens` (or `total_tokens`), `loss`, `val_loss` and
            `learning_rate`; or a metrics.csv, or a run's directory.
        png: the file to write.
        title: the line above the picture.
        reference: levels to draw across it, by label, such as the unigram entropy of the data
            (nats per token): a model above it has learnt less than word frequencies.

    Raises:
        UserError: no row holds a loss, or the file cannot be written.
    """
    table = read_metrics(rows) if isinstance(rows, Path) else list(rows)
    axis, unit = _axis(table)
    train, val = _curve(table, "loss", axis), _curve(table, "val_loss", axis)
    rate = _curve(table, "learning_rate", axis)
    if not train[0] and not val[0]:
        raise UserError("no loss to draw: no row has a finite 'loss' or 'val_loss'.")
    write_atomic(png, _draw(train, val, rate, unit, title, reference or {}))
    return png


def _axis(table: Sequence[Mapping[str, Any]]) -> tuple[dict[float, float], str]:
    """Return x by step, and its name: all ranks' tokens where logged, else steps.

    Validation rows often carry a step only: they stand where that step's training row stands.
    """
    steps = [float(row["step"]) for row in table if "step" in row]
    for key in ("total_tokens", "tokens"):
        places = {float(row["step"]): float(row[key]) for row in table if {"step", key} <= set(row)}
        if len(places) > 1 or (places and len(set(steps)) == 1):
            return {step: _interpolate(step, places) for step in steps}, "tokens"
    return {step: step for step in steps}, "optimizer steps"


def _interpolate(step: float, places: Mapping[float, float]) -> float:
    """Return x at `step`: known, or on the line through the known steps around it."""
    if step in places:
        return places[step]
    known = sorted(places)
    after = next((i for i, other in enumerate(known) if other > step), len(known) - 1)
    low, high = known[max(after - 1, 0)], known[max(after, 1)]
    slope = (places[high] - places[low]) / (high - low)
    return places[low] + slope * (step - low)


def _curve(table: Iterable[Mapping[str, Any]], key: str, axis: Mapping[float, float]) -> Curve:
    """Return the finite values of one column over x; rows without a step are numbered."""
    points = {}
    for number, row in enumerate(table):
        value = row.get(key)
        if value is not None and math.isfinite(float(value)):
            points[axis[float(row["step"])] if "step" in row else float(number)] = float(value)
    xs = sorted(points)
    return xs, [points[x] for x in xs]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return means over up to `window` values on either side.

    At the start, where the loss falls fast, no more is taken after a value than before it: a mean
    that lags would hide the fall.
    """
    sums = [0.0, *accumulate(values)]
    spans = [
        (i - min(i, window), min(i + min(i, window) + 1, len(values))) for i in range(len(values))
    ]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _draw(
    train: Curve,
    val: Curve,
    rate: Curve,
    unit: str,
    title: str,
    reference: Mapping[str, float],
) -> bytes:
    """Render the picture as PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6 if rate[0] else 5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    if rate[0]:
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        _draw_rate(rates, rate)
        bottom = rates
    else:
        losses = bottom = figure.subplots()
    _draw_losses(losses, train, val, reference)
    losses.set_title(title, loc="left", fontsize=12, fontweight="bold")
    bottom.set_xlabel(unit)
    bottom.xaxis.set_major_formatter(short_number)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_losses(axes: "Axes", train: Curve, val: Curve, reference: Mapping[str, float]) -> None:
    xs, ys = train
    if xs:
        means = smooth(ys, len(ys) // 50)
        axes.plot(xs, ys, color=_TRAIN, alpha=0.28, linewidth=0.9)
        axes.plot(xs, means, color=_TRAIN, linewidth=1.8, label=f"train {means[-1]:.3f}")
    if val[0]:
        label = f"held out {val[1][-1]:.3f} (best {min(val[1]):.3f})"
        axes.plot(*val, "o-", color=_VAL, markersize=4, linewidth=1.1, label=label)
    for label, level in reference.items():
        axes.axhline(level, color=_REFERENCE, linestyle=(0, (5, 4)), linewidth=1.0)
        axes.annotate(
            f"{label} {level:.2f}",
            xy=(1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=_REFERENCE,
            fontsize=9,
        )
    _choose_scale(axes, [*ys, *val[1], *reference.values()])
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, loc="upper right")


def _choose_scale(axes: "Axes", values: Sequence[float]) -> None:
    """Use a logarithmic axis with plain numbers where the loss falls by more than half."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if min(values) <= 0 or max(values) < 2 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_rate(axes: "Axes", rate: Curve) -> None:
    axes.plot(*rate, color=_RATE, linewidth=1.4)
    axes.set_ylabel("learning rate", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.tick_params(labelsize=9)


def short_number(value: float, _: object = None) -> str:
    """Write 1,500,000 as 1.5 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"
