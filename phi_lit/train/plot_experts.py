"""The heat map of a mixture of experts: which experts of which layer worked, over the training.

Drawn from the rows of a run's record that hold `experts`, without pyplot as in `plot.py`. A row of
the picture is an expert, a column a step; white is an expert's fair share, blue less, red more.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi_lit.errors import UserError
from phi_lit.files import write_atomic
from phi_lit.train.plot import short_number

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 600
"""The most columns drawn: further rows are averaged."""

OVERLOADED = 3.0
"""Load, in fair shares, at which the red is darkest."""


def plot_experts(rows: Sequence[Mapping[str, Any]], png: Path, title: str) -> Path:
    """Draw the heat map and return `png`, which is written whole or not at all.

    Args:
        rows: rows of a run's record; those with `tokens` and `experts` are drawn. `experts` holds,
            for each layer of experts, the number of its `block`, the `load` of every expert in
            thousandths, and the router's `entropy` in nats.
        png: the file to write.
        title: the line above the picture.

    Raises:
        UserError: no row has `experts`, or the file cannot be written.
    """
    import numpy as np

    drawn = [row for row in rows if "experts" in row]
    if not drawn:
        raise UserError("no expert load to draw: no row has 'experts'.")
    tokens = np.array([row["tokens"] for row in drawn], dtype=float)
    load_SLE = np.array([row["experts"]["load"] for row in drawn], dtype=float)
    entropy_SL = np.array([row["experts"]["entropy"] for row in drawn], dtype=float)
    fair_SLE = load_SLE * load_SLE.shape[2] / 1000
    blocks = drawn[0]["experts"]["block"]
    content = _draw(_thinned(tokens), _thinned(fair_SLE), _thinned(entropy_SL), blocks, title)
    write_atomic(png, content)
    return png


def _thinned(table: "np.ndarray") -> "np.ndarray":
    """Average neighbouring steps until at most `COLUMNS` are left."""
    import numpy as np

    if len(table) <= COLUMNS:
        return table
    return np.stack([part.mean(axis=0) for part in np.array_split(table, COLUMNS)])


def _draw(
    tokens: "np.ndarray",
    fair_SLE: "np.ndarray",
    entropy_SL: "np.ndarray",
    blocks: list[int],
    title: str,
) -> bytes:
    """Render the picture as PNG bytes. Letters: S steps, L layers, E experts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _, layers, experts = fair_SLE.shape
    tall = min(3 + 0.12 * layers * experts, 24)
    figure = Figure(figsize=(10, tall + 2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    heat, lines = figure.subplots(2, 1, sharex=True, height_ratios=[tall, 2])
    _draw_heat(figure, heat, tokens, fair_SLE, blocks)
    _draw_entropy(lines, tokens, entropy_SL, experts)
    heat.set_title(title, loc="left", fontsize=12, fontweight="bold")
    lines.set_xlabel("tokens")
    lines.xaxis.set_major_formatter(short_number)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_heat(
    figure: "Figure", axes: "Axes", tokens: "np.ndarray", fair_SLE: "np.ndarray", blocks: list[int]
) -> None:
    """Draw an expert per line, the layers one above the other with a rule between them."""
    from matplotlib.colors import TwoSlopeNorm

    steps, layers, experts = fair_SLE.shape
    image = axes.pcolormesh(
        _edges(tokens),
        range(layers * experts + 1),
        fair_SLE.reshape(steps, -1).T,
        cmap="RdBu_r",
        norm=TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=OVERLOADED),
        rasterized=True,
    )
    axes.invert_yaxis()
    axes.hlines(
        [layer * experts for layer in range(1, layers)], *axes.get_xlim(), color="#444444", lw=0.8
    )
    axes.set_yticks(
        [(layer + 0.5) * experts for layer in range(layers)],
        [f"block {block}" for block in blocks],
    )
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel(f"{experts} experts per layer")
    figure.colorbar(image, ax=axes, label="load, in fair shares", extend="max", shrink=0.8)


def _edges(places: "np.ndarray") -> "np.ndarray":
    """Return where the columns around these places meet: one more than there are places."""
    import numpy as np

    if len(places) == 1:
        return np.array([0.0, 2 * places[0]])
    middles = (places[1:] + places[:-1]) / 2
    first, last = 2 * places[0] - middles[0], 2 * places[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])


def _draw_entropy(
    axes: "Axes", tokens: "np.ndarray", entropy_SL: "np.ndarray", experts: int
) -> None:
    """Draw each layer's router entropy below its ceiling, ln E: a router that has not decided."""
    import numpy as np

    layers = entropy_SL.shape[1]
    for layer in range(layers):
        shade = 0.25 + 0.6 * layer / max(layers - 1, 1)
        axes.plot(tokens, entropy_SL[:, layer], color=str(1 - shade), linewidth=1.0)
    ceiling = float(np.log(experts))
    axes.axhline(ceiling, color="#7a7a7a", linestyle=(0, (5, 4)), linewidth=1.0)
    axes.annotate(
        f"ln {experts}", xy=(1, ceiling), xycoords=("axes fraction", "data"), xytext=(-4, -11),
        textcoords="offset points", ha="right", color="#7a7a7a", fontsize=9,
    )  # fmt: skip
    axes.set_ylabel("router entropy\n(nats, darker: later block)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
