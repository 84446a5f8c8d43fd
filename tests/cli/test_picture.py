"""The curve of a training run, or what drawing it needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from barefoot.cli import picture
from barefoot.core.errors import BackendMissing

METRICS: list[dict[str, Any]] = [
    {"step": 0, "loss": 3.0},
    {"step": 1, "loss": None},
    {"step": 2, "loss": 2.5},
    {"step": 2, "held_out_loss": 2.75},
    {"step": 4, "loss": 2.0},
    {"step": 4, "held_out_loss": 2.25},
]


@pytest.mark.parametrize("metrics", [METRICS, METRICS[:1], []])
def test_losses_over_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics: list[dict[str, Any]]):
    path = tmp_path / "loss.png"
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(BackendMissing, match="a picture needs matplotlib"):
            picture.over_steps(str(path), "a run", metrics)
        return
    figures: list[Any] = []
    plot = picture.pyplot()
    monkeypatch.setattr(plot, "close", figures.append)
    picture.over_steps(str(path), "a run", iter(metrics))
    monkeypatch.undo()
    assert path.read_bytes()[:4] == b"\x89PNG"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    plot.close(figures[0])
    training = [[m["step"], m["loss"]] for m in metrics if m.get("loss") is not None]
    held_out = [[m["step"], m["held_out_loss"]] for m in metrics if "held_out_loss" in m]
    assert drawn == {label: points for label, points in (("training", training), ("held out", held_out)) if points}
