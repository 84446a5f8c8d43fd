"""Sorting a stack: which residual blocks of a model come first.

BitStack (Wang et al. 2024, arXiv:2410.23918), section 3.3: level by level. With all matrices at l blocks, raise one at
a time to l + 1 and measure the perplexity of a small text; the blocks of that level come in the order of rising
perplexity, and then all matrices have l + 1. So two matrices never differ by more than one block.

*Differs from the paper*: that is an evaluation for every block, thousands of them. Here the first ``n_measured`` levels
are measured so, and the gains of later ones follow from the energy of what the blocks add: the gain of a matrix at the
last level measured, times |block|² there over |block|² here. |S * (U V)|² = sum of (UᵀU) * (V Vᵀ) needs no signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.core.model import ModelSpec
from barefoot.engine.runner import Engine
from barefoot.engine.stacks import signed
from barefoot.evals.scoring import score
from barefoot.ops import signs

Gains = Mapping[str, float]  # by matrix: how many nats of log-perplexity a further block takes off
Progress = Callable[[int, int, str], None]  # evaluations done, in all, and the matrix


def sort_stack(
    engine: Engine, texts: Sequence[Sequence[int]], *, n_measured: int = 1, progress: Progress | None = None
) -> list[str]:
    """The tensors of the stack of ``engine``, which must hold all of it, in the order in which to load them.

    Parameters
    ----------
    texts : windows of ids, of which the second halves are scored, each time anew.
    n_measured : levels measured block by block, each at one evaluation for a matrix and one more.

    Raises
    ------
    InvalidInput : no stack, or only a part of it, or no level to measure.
    """
    levels = stack_levels(engine.spec)
    if not levels or n_measured < 1 or engine.stacks is None or engine.stacks.n != len(engine.spec.stack):
        raise InvalidInput(f"sorting measures 1 level or more of a stack all in memory, got {n_measured}")
    energies = block_energies(engine)
    order: list[str] = []
    gains: Gains = {}
    measured = 0
    for level, sources in enumerate(levels):
        if level < n_measured:
            gains, measured = measure_gains(engine, texts, level + 1, sources, progress), level
        taken = {n: gains[n] * energies[n][level + 1] / max(energies[n][measured + 1], 1e-300) for n in sources}
        order += [sources[name] for name in sorted(sources, key=taken.__getitem__, reverse=True)]
    engine.stacks.show({})
    return order


def stack_levels(spec: ModelSpec) -> list[dict[str, str]]:
    """For each level beyond the first the tensor that each matrix has there."""
    chains = {w.name: [part.source for part in signed(w)][1:] for w in spec.weights if signed(w)}
    most = max(map(len, chains.values()), default=0)
    return [{name: chain[level] for name, chain in chains.items() if level < len(chain)} for level in range(most)]


def measure_gains(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    level: int,
    matrices: Mapping[str, str],
    progress: Progress | None = None,
) -> dict[str, float]:
    """What each of ``matrices`` gains as the only one with ``level + 1`` blocks, all others having ``level``.

    A perplexity that is no number counts as the worst of all.
    """
    assert engine.stacks is not None
    show = engine.stacks.show
    everywhere = {w.name: level for w in engine.spec.weights if signed(w)}

    def loss(counts: Mapping[str, int]) -> float:
        show(counts)
        value = math.log(score(texts, engine)["perplexity"])
        return value if math.isfinite(value) else math.inf

    base = loss(everywhere)
    losses = {}
    for done, name in enumerate(matrices):
        if progress is not None:
            progress(done, len(matrices), name)
        losses[name] = loss(everywhere | {name: level + 1})
    worst = max((value for value in losses.values() if value < math.inf), default=0.0)
    base = min(base, worst)
    return {name: base - min(value, worst) for name, value in losses.items()}


def block_energies(engine: Engine) -> dict[str, list[float]]:
    """The sum of squares of each block of each matrix, in their order."""
    found = {}
    assert engine.stacks is not None
    for name, stack in engine.stacks.matrices.items():
        factors = (signs.factors(stack.rows, stack.cols, np.asarray(block)) for block in stack.buffers)
        wide = ((u.astype(np.float64), v.astype(np.float64)) for u, v in factors)
        found[name] = [float(((u.T @ u) * (v @ v.T)).sum()) for u, v in wide]
    return found
