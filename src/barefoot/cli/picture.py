"""Pictures, drawn with matplotlib: quality over bytes, losses over steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barefoot.evals.frontier import Point


def pyplot() -> Any:
    """matplotlib's pyplot, without a window.

    Raises
    ------
    BackendMissing : matplotlib is not installed.
    """
    from barefoot.core.errors import BackendMissing

    try:
        import matplotlib
    except ImportError:
        raise BackendMissing(
            "a picture needs matplotlib", cure="pip install barefoot[plot], or leave --png out"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def over_bytes(
    path: str,
    title: str,
    points: Sequence[Point],
    bytes_label: str,
    kl_label: str,
    *,
    line: Sequence[Point] = (),
    mark: int | None = None,
) -> None:
    """Write a PNG: KL of named ``points`` on a logarithmic scale over MiB, those of ``line`` joined, ``mark`` bytes
    marked."""
    plot = pyplot()
    figure, axes = plot.subplots(figsize=(8, 5), layout="constrained")
    axes.scatter([p.n_bytes / 2**20 for p in points], [p.kl for p in points], s=14, label="one way each")
    for p in points:
        axes.annotate(p.name, (p.n_bytes / 2**20, p.kl), fontsize=6, xytext=(3, 2), textcoords="offset points")
    if line:
        ordered = sorted(line, key=lambda p: p.n_bytes)
        axes.plot([p.n_bytes / 2**20 for p in ordered], [p.kl for p in ordered], "o-", color="C3", label="fitted")
    if mark is not None:
        axes.axvline(mark / 2**20, linestyle=":", color="grey")
    axes.set(yscale="log", xlabel=bytes_label, ylabel=kl_label, title=title)
    axes.legend()
    figure.savefig(path, dpi=150)
    plot.close(figure)


def over_steps(path: str, title: str, metrics: Iterable[Mapping[str, Any]]) -> None:
    """Write a PNG: the losses of a training run over its steps, and those on held-out data where there are any.

    ``metrics`` are the lines that :func:`barefoot.train.metrics.read` gives; ``loss`` and ``held_out_loss`` are drawn.
    """
    plot = pyplot()
    found: dict[str, list[tuple[int, float]]] = {"loss": [], "held_out_loss": []}
    for line in metrics:
        for key, points in found.items():
            if isinstance(line.get(key), (int, float)):
                points.append((line["step"], line[key]))
    figure, axes = plot.subplots(figsize=(8, 5), layout="constrained")
    if found["loss"]:
        axes.plot(*zip(*found["loss"], strict=True), linewidth=0.8, label="training")
    if found["held_out_loss"]:
        axes.plot(*zip(*found["held_out_loss"], strict=True), "o-", color="C3", label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per predicted token", title=title)
    if any(found.values()):
        axes.legend()
    figure.savefig(path, dpi=150)
    plot.close(figure)
