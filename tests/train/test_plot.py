"""The loss curve: what is drawn where, from rows and from LitGPT's CSV, and what is refused."""

import math

import pytest

from phi_lit.errors import UserError
from phi_lit.train import plot


def rows(n=40, **more):
    return [
        {
            "step": i,
            "tokens": i * 100,
            "loss": 3 + 5 * math.exp(-i / 9),
            "learning_rate": 1e-3,
            **more,
        }
        for i in range(n)
    ]


def test_rows_become_a_picture(tmp_path):
    table = [*rows(), {"step": 19, "val_loss": 4.0}, {"step": 39, "val_loss": 3.5}]
    png = plot.plot_losses(table, tmp_path / "deep" / "loss.png", "a run", {"unigram entropy": 7.1})
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000  # an empty picture of this size is a few kB
    assert [found.name for found in png.parent.iterdir()] == ["loss.png"]


def test_litgpt_csv_becomes_the_same_picture(tmp_path):
    from lightning.fabric.loggers.csv_logs import CSVLogger

    logger = CSVLogger(tmp_path / "logs", name="csv")
    for row in rows():
        logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=row["step"])
    logger.log_metrics({"val_loss": 3.5}, step=39)
    logger.save()
    table = [*rows(), {"step": 39, "val_loss": 3.5}]
    pictures = [
        plot.plot_losses(source, tmp_path / f"{name}.png", "a run").read_bytes()
        for name, source in {"csv": tmp_path, "rows": table}.items()
    ]
    assert pictures[0] == pictures[1]


def test_a_step_without_tokens_stands_between_its_neighbours():
    axis, unit = plot._axis([{"step": 0, "tokens": 0}, {"step": 10, "tokens": 1000}, {"step": 4}])
    assert (axis, unit) == ({0.0: 0.0, 10.0: 1000.0, 4.0: 400.0}, "tokens")


def test_a_step_past_the_last_tokens_is_extrapolated():
    axis, _ = plot._axis([{"step": 0, "tokens": 0}, {"step": 10, "tokens": 1000}, {"step": 12}])
    assert axis[12.0] == 1200.0


def test_steps_are_the_axis_where_no_tokens_were_logged():
    assert plot._axis([{"step": 3, "loss": 1.0}]) == ({3.0: 3.0}, "optimizer steps")


def test_smoothing_is_a_mean_that_does_not_lag_at_the_start():
    assert plot.smooth([2.0] * 5, 2) == pytest.approx([2.0] * 5)
    assert plot.smooth([9.0, 6.0, 3.0, 0.0], 1) == pytest.approx([9.0, 6.0, 3.0, 1.5])
    assert plot.smooth([8.0, 2.0], 0) == [8.0, 2.0]


def test_infinite_losses_are_left_out(tmp_path):
    table = [*rows(4), {"step": 4, "loss": math.nan}, {"step": 5, "loss": math.inf}]
    axis, _ = plot._axis(table)
    assert len(plot._curve(table, "loss", axis)[0]) == 4
    assert plot.plot_losses(table, tmp_path / "x.png", "x").is_file()


def test_one_row_is_enough(tmp_path):
    assert plot.plot_losses(rows(1), tmp_path / "x.png", "x").is_file()


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(UserError, match="no loss to draw"):
        plot.plot_losses([{"step": 1, "loss": math.nan}], tmp_path / "x.png", "x")
    with pytest.raises(UserError, match=r"no metrics.csv .* --logger_name csv"):
        plot.plot_losses(tmp_path, tmp_path / "x.png", "x")


def test_large_numbers_are_written_short():
    assert [plot.short_number(v) for v in (0, 950, 1500, 2.5e6, 5e10)] == [
        "0", "950", "1.5 k", "2.5 M", "50 B",
    ]  # fmt: skip
