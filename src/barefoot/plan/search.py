"""search — the best plan's values, over all frames and all options, and the smallest memory that any plan needs.

Exact: frames are visited in the order of the least time that they can have, each is searched exactly, and the search
ends when no frame left can be better. Bytes of the slots bound from below what a frame needs; whether a choice fits is
decided by the whole job's footprint, which the engine obeys.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

from barefoot.core.ledger import Footprint, Place
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import footprint as engine_footprint
from barefoot.plan import compositions
from barefoot.plan.choices import Caches, Frame, Problem, Tables
from barefoot.plan.memory import accelerator_footprint
from barefoot.plan.solve import Choice, best, by_bytes, by_speed, pace

ANY_BYTES = 1 << 62


@dataclass(frozen=True)
class Solution:
    """A frame, a value for each slot, and the bytes of the whole job with them."""

    frame: Frame
    choice: Choice
    config: EngineConfig
    footprint: Footprint


@dataclass(frozen=True)
class _Least:
    """The least that any choice within a frame costs."""

    frame: Frame
    bytes: tuple[int, int]
    seconds: float
    kl: float


class Search:
    """The search for one problem; ``fixed`` are bytes that are there whatever is chosen (runtime, tokenizer)."""

    def __init__(self, problem: Problem, fixed: Footprint) -> None:
        self.problem = problem
        self.fixed = fixed
        self.place: Place = "accelerator" if problem.device.n_accelerators else "host"
        self._tables = Tables(problem)
        self._sizes = Tables(problem, timed=False)
        self._frames = problem.frames()
        self._smallest_chunk = min(f.chunk for f in self._frames)
        self._overhead = functools.cache(self._compute_overhead)
        self._least = functools.cache(lambda frame, caches: _Least(frame, *self._tables.least(frame, caches)))
        self._least_size = functools.cache(lambda frame, caches: self._sizes.least(frame, caches)[0])

    def footprint(self, frame: Frame, config: EngineConfig) -> Footprint:
        """Every byte of the job."""
        problem = self.problem
        if self.place == "accelerator":
            job = accelerator_footprint(problem.spec, config, problem.job, problem.device, frame.n_slow)
        else:
            job = engine_footprint(problem.spec, config)
        return self.fixed + job

    def _compute_overhead(self, chunk: int, streams: bool, stream_head: bool) -> tuple[int, int]:
        """Bytes beyond those of the slots, in both places, while the model runs: a bound for all such frames."""
        frame = Frame(chunk, 0, stream_head)
        if streams:
            frame = min((f for f in self._frames if f.n_slow), key=lambda f: f.n_slow)
            frame = Frame(chunk, frame.n_slow, stream_head)
        best_caches = Caches(math.inf, min(map(compositions.rank, self.problem.caches)))
        slots = self._sizes.slots(frame, best_caches)
        cheapest = [min(s, key=lambda o: o.kl) for s in slots]
        config = self.problem.config(frame, [o.value for o in cheapest])
        total = self.footprint(frame, config)

        def beyond(place: Place, index: int) -> int:
            running = max(total.select(place=place, phase=phase).bytes for phase in ("prefill", "decode"))
            return max(0, running - sum(o.bytes[index] for o in cheapest))

        return beyond(self.place, 0), beyond("host", 1) if self.place == "accelerator" else 0

    def _room(self, frame: Frame, budget: Mapping[Place, int]) -> tuple[int, int]:
        main, second = self._overhead(frame.chunk, frame.n_slow > 0, frame.stream_head)
        host = budget["host"] - second if self.place == "accelerator" else 0
        return budget[self.place] - main, host

    def _may_fit(self, frame: Frame, caches: Caches, budget: Mapping[Place, int]) -> bool:
        """Whether the least bytes of the frame, had it the smallest chunk, are within the budget."""
        smallest = replace(frame, chunk=self._smallest_chunk)  # a smaller chunk never takes more bytes
        return not any(map(operator.gt, self._least_size(smallest, caches), self._room(smallest, budget)))

    def fits(self, footprint: Footprint, budget: Mapping[Place, int]) -> bool:
        """Whether the peak of each place is within its budget."""
        return all(footprint.peak(place)[1] <= allowed for place, allowed in budget.items())

    def fastest(self, budget: Mapping[Place, int], max_kl: float, *, rank: int) -> Solution | None:
        """The fastest choice within the budget whose predicted KL is at most ``max_kl``; None if nothing fits.

        ``rank``: of those whose cache has it (:func:`barefoot.plan.compositions.rank`).
        """
        caches = Caches(max_kl, rank)
        if not self._tables.asked(caches):
            return None
        found: list[Solution] = []

        def accept(frame: Frame, choice: Choice) -> bool:
            config = self.problem.config(frame, choice.values)
            total = self.footprint(frame, config)
            if not self.fits(total, budget):
                return False
            found[:] = [Solution(frame, choice, config, total)]
            return True

        limit = None
        frames = [self._least(frame, caches) for frame in self._frames if self._may_fit(frame, caches, budget)]
        for least in sorted(frames, key=lambda f: f.seconds):
            if limit is not None and pace(least.seconds * (1 - 1e-12)) > limit[0]:
                break
            room = self._room(least.frame, budget)
            if least.bytes[0] > room[0] or least.bytes[1] > room[1] or least.kl > max_kl + 1e-12:
                continue
            frame = least.frame
            options = self._tables.slots(frame, caches)
            choice = best(options, room, max_kl=max_kl, below=limit)
            if choice is not None and not accept(frame, choice):  # bounds are not the whole footprint
                choice = best(options, room, max_kl=max_kl, below=limit, accept=functools.partial(accept, frame))
            if choice is not None:
                limit = by_speed(choice.bytes[0], choice.seconds, choice.kl)
        return found[0] if found else None

    def smallest(self, max_kl: float, host: int | None, *, rank: int) -> Solution | None:
        """The choice with the least peak in the place that computes, whose predicted KL is at most ``max_kl``.

        ``rank`` as in ``fastest``. None when the KL can't be reached, or when the host beside accelerators, of
        ``host`` bytes, is too small.
        """
        caches = Caches(max_kl, rank)
        if not self._tables.asked(caches):
            return None
        bounds = [(self._bound(f, caches), f) for f in self._frames if f.chunk == self._smallest_chunk]
        found: Solution | None = None
        peak = math.inf
        for bound, frame in sorted(bounds, key=lambda item: item[0]):
            if bound >= peak:
                break
            capacities = (ANY_BYTES, ANY_BYTES)
            if self.place == "accelerator" and host is not None:
                capacities = self._room(frame, {self.place: ANY_BYTES, "host": host})
            choice = best(self._sizes.slots(frame, caches), capacities, max_kl=max_kl, key=by_bytes)
            if choice is None:
                continue
            config = self.problem.config(frame, choice.values)
            total = self.footprint(frame, config)
            if total.peak(self.place)[1] < peak:
                found, peak = Solution(frame, choice, config, total), total.peak(self.place)[1]
        return found

    def _bound(self, frame: Frame, caches: Caches) -> int:
        """Bytes that any choice within the frame needs where the computation is."""
        return self._least_size(frame, caches)[0] + self._overhead(frame.chunk, frame.n_slow > 0, frame.stream_head)[0]
