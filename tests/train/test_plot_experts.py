"""The heat map of the experts' load: what is drawn where, and what is refused."""

import numpy as np
import pytest

from phi_lit.errors import UserError
from phi_lit.train import plot_experts


def rows(steps=30, layers=3, experts=4):
    generator = np.random.default_rng(0)
    load = generator.dirichlet(np.ones(experts), (steps, layers))
    return [
        {"step": s + 1, "tokens": 100 * (s + 1), "loss": 2.0, "experts": {
            "block": list(range(1, layers + 1)),
            "load": (1000 * load[s]).round().astype(int).tolist(), "entropy": [1.2] * layers}}
        for s in range(steps)
    ]  # fmt: skip


def test_rows_become_a_picture_and_others_are_passed_over(tmp_path):
    table = [*rows(), {"step": 31, "tokens": 3100, "loss": 2.0}, {"step": 31, "val_loss": 1.0}]
    png = plot_experts.plot_experts(table, tmp_path / "experts.png", "a run")
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    same = plot_experts.plot_experts(rows(), tmp_path / "same.png", "a run")
    assert same.read_bytes() == content
    other = plot_experts.plot_experts(rows(29), tmp_path / "other.png", "a run")
    assert other.read_bytes() != content


@pytest.mark.parametrize(("steps", "layers", "experts"), [(1, 1, 1), (1, 2, 8), (2, 24, 64)])
def test_any_number_of_steps_layers_and_experts_is_drawn(tmp_path, steps, layers, experts):
    table = rows(steps, layers, experts)
    assert plot_experts.plot_experts(table, tmp_path / "x.png", "a run").stat().st_size > 5_000


def test_a_long_run_is_averaged_not_sampled():
    table = np.arange(1800.0)
    thinned = plot_experts._thinned(table)
    assert len(thinned) == plot_experts.COLUMNS
    assert thinned[:2].tolist() == [1.0, 4.0]
    assert thinned.mean() == pytest.approx(table.mean())


def test_columns_meet_halfway_between_steps():
    assert plot_experts._edges(np.array([1.0, 3.0, 4.0])).tolist() == [0.0, 2.0, 3.5, 4.5]


def test_a_run_without_experts_is_said(tmp_path):
    with pytest.raises(UserError, match="no row has 'experts'"):
        plot_experts.plot_experts([{"step": 1, "loss": 1.0}], tmp_path / "x.png", "x")
