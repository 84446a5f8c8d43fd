"""The compressed KV cache of one sequence: entries at slots, of each layer and key head its own, under a policy.

A prompt passes layer by layer. While one layer is passed, the prompt's keys and values stand in *staging*, in half
precision, as far as they are there; behind the last token the policy chooses what of them and of the earlier entries
stays, and that goes to the layer's *slots*, in the rows of the store. So one layer is whole at a time, and all others
have what they keep. A decoded token's entry goes to a slot, too, and the policy may send one or more away then.

Softmax is over what is there: entries that are gone stop existing. Keys keep the rotation of their positions, and
positions go on counting all tokens.

Bytes, of n layers with H key heads and rows of r bytes, S = ``policy.slots(context)`` (or context without a policy):
n × H × S × (2 r + 4), 4 more for a policy that looks at mass; staging H × context × 4 × head_dim, and 4 for each entry
that is observed; and what :meth:`Cache.workspace` counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Term
from barefoot.kv.policies import Policy, Seen
from barefoot.kv.stores import KVStore

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
Take = Callable[[int], U8]

STAGED = "f16"
OBSERVED_TOKENS = 8  # of a prompt whose scores are held at a time
MOVED_ROWS = 256  # entries of a key head that are decoded at a time


@dataclass(frozen=True)
class Heads:
    """Of each layer: sizes, the factor of scores and their cap (0 for none)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    softcap: float = 0.0


@dataclass(frozen=True)
class Layout:
    """What a cache of ``n_layers`` layers is made of, before anything is allocated."""

    heads: Heads
    n_layers: int
    context: int
    policy: Policy | None
    store: KVStore
    chunk: int = 64

    @property
    def slots(self) -> int:
        return self.context if self.policy is None else self.policy.slots(self.context)

    @property
    def observes(self) -> str:
        return "nothing" if self.policy is None else self.policy.observes

    @property
    def n_observed(self) -> int:
        """Rows of what is observed of a layer: a key head's, or a query head's."""
        return {"nothing": 0, "mass": self.heads.n_kv_heads, "votes": self.heads.n_heads}[self.observes]

    def own_arrays(self) -> tuple[int, ...]:
        """Bytes of each array of a sequence: keys, values, positions, mass."""
        entries = self.n_layers * self.heads.n_kv_heads * self.slots
        rows = entries * self.store.row_bytes(self.heads.head_dim)
        return (rows, rows, 4 * entries, *((4 * entries,) if self.observes == "mass" else ()))

    def shared_arrays(self, n_threads: int) -> tuple[int, ...]:
        """Bytes of each array of the workspace: staged keys and values, observed, the state, scores, scratch."""
        staging, observed, *state, scores, scratch = (term.bytes for term in self.workspace(n_threads))
        heads = self.chunk * self.heads.n_heads
        return (staging // 2, staging // 2, observed, sum(state) - 8 * heads, 4 * heads, 4 * heads, scores, scratch)

    def terms(self) -> tuple[Term, ...]:
        """What stays while the cache lives."""
        h = self.heads
        entries = self.n_layers * h.n_kv_heads * self.slots
        rows = [Term(f"kv {n}", 2 * entries * c, size) for n, c, size in self.store.row_parts(h.head_dim)]
        mass = [Term("kv mass", entries, 4)] if self.observes == "mass" else []
        return (*rows, Term("kv positions", entries, 4), *mass)

    def workspace(self, n_threads: int) -> tuple[Term, ...]:
        """What passes share: staging, the state of a pass, scores of those tokens that are observed, scratch."""
        h, n = self.heads, self.chunk
        state = n * h.n_heads * (h.head_dim + 2)
        scores = min(n, OBSERVED_TOKENS) * h.n_heads * (self.slots + self.context) if self.n_observed else 0
        return (
            Term("kv staging", 2 * h.n_kv_heads * self.context, ops.kv_row_bytes(STAGED, h.head_dim)),
            Term("kv staging observed", self.n_observed * (self.slots + self.context), 4),
            Term("kv state", state, 4),
            Term("kv scores", scores, 4),
            Term("kv scratch", self.scratch_bytes(n_threads), 1),
        )

    def scratch_bytes(self, n_threads: int) -> int:
        h = self.heads
        sizes = (
            ops.attention_scratch_bytes(n, h.n_heads, h.n_kv_heads, h.head_dim, n_threads=n_threads)
            for n in {1, min(self.chunk, OBSERVED_TOKENS), self.chunk}
        )
        return max(sizes)


class Workspace:
    """The arrays that all layers, and all sequences, use in turn."""

    def __init__(self, layout: Layout, take: Take, n_threads: int) -> None:
        h, n = layout.heads, layout.chunk
        row = ops.kv_row_bytes(STAGED, h.head_dim)
        shape = (h.n_kv_heads, layout.context, row)
        self.keys, self.values = (take(int(np.prod(shape))).reshape(shape) for _ in range(2))

        def floats(*shape: int) -> F32:
            return take(4 * int(np.prod(shape))).view(np.float32).reshape(shape)

        self.observed = floats(layout.n_observed, layout.slots + layout.context)
        self.sums = floats(n, h.n_heads, h.head_dim)
        self.tops, self.totals = floats(n, h.n_heads), floats(n, h.n_heads)
        n_scores = min(n, OBSERVED_TOKENS) * h.n_heads * (layout.slots + layout.context) if layout.n_observed else 0
        self.scores = floats(n_scores)
        self.scratch = take(layout.scratch_bytes(n_threads))


class Cache:
    """One sequence's entries.

    Parameters
    ----------
    workspace : shared with other sequences of the same layout; one passes at a time.
    take : gives zeroed bytes.
    """

    def __init__(self, layout: Layout, workspace: Workspace, take: Take) -> None:
        h, self.layout, self._work = layout.heads, layout, workspace
        self._format = layout.store.row_format
        rows = (layout.n_layers, h.n_kv_heads, layout.slots, layout.store.row_bytes(h.head_dim))
        each = rows[:3]
        self._keys, self._values = (take(int(np.prod(rows))).reshape(rows) for _ in range(2))
        self._position = take(4 * int(np.prod(each))).view(np.int32).reshape(each)
        self._mass: F32 | None = None
        if layout.observes == "mass":
            self._mass = take(4 * int(np.prod(each))).view(np.float32).reshape(each)
        self._count = np.zeros((layout.n_layers, h.n_kv_heads), np.int32)  # the same for all heads of a layer
        self._free: I32 | None = (
            None  # (n_layers, n_kv_heads): a slot below the count without an entry, if there is one
        )
        self._staged = np.zeros(h.n_kv_heads, np.int32)
        self._segments = [
            self._segment(self._format, self._keys[i], self._values[i], self._count[i]) for i in range(layout.n_layers)
        ]
        self._staging = self._segment(STAGED, workspace.keys, workspace.values, self._staged)
        self.n_tokens = 0
        self._prompt = 0  # tokens of the prompt that passes, 0 for none
        self._evicted_at = 0  # tokens that there were when an entry went last

    def _segment(self, fmt: str, keys: U8, values: U8, counts: I32) -> ops.Segment:
        dim = self.layout.heads.head_dim
        return ops.Segment(fmt, keys, fmt, values, key_dim=dim, value_dim=dim, counts=counts)

    def entries(self, layer: int) -> int:
        """How many entries each key head of a layer has."""
        return int(self._count[layer, 0]) - (self._free is not None)

    def clear(self) -> None:
        """Forget all entries, and the prompt that passes."""
        self._count[...] = 0
        self._staged[:] = 0
        self._free = None
        self.n_tokens = self._prompt = self._evicted_at = 0

    def trim(self, n: int) -> None:
        """Go back to the first ``n`` tokens.

        Raises
        ------
        InvalidInput : entries have gone since, or what has been observed since can't be taken back.
        """
        if n == self.n_tokens:
            return
        if n == 0:
            self.clear()
            return
        self.check_trim(n)
        self._close()
        for layer, head in np.ndindex(*self._count.shape):
            count = self._count[layer, head]
            stay = np.flatnonzero(self._position[layer, head, :count] < n)
            free = np.setdiff1d(np.arange(len(stay)), stay)
            self._move(layer, head, stay[stay >= len(stay)], free)
            self._count[layer, head] = len(stay)
        self.n_tokens = n

    def check_trim(self, n: int) -> None:
        """Raise what :meth:`trim` would."""
        if 0 < n < self.n_tokens and (self._mass is not None or n < self._evicted_at):
            raise InvalidInput(
                f"can't go back from {self.n_tokens} tokens to {n}: {self.layout.policy} has "
                + ("seen what came behind" if self._mass is not None else "sent entries away since"),
                cure="reset, and prefill the kept tokens again",
            )

    # --- a prompt ---------------------------------------------------------------------------------------------------

    def begin(self, n_tokens: int) -> None:
        """``n_tokens`` are about to pass all layers, one layer after the other.

        Raises
        ------
        InvalidInput : fewer positions, or slots, are left.
        """
        left = self.layout.context - self.n_tokens
        if self.layout.policy is None:
            left = min(left, self.layout.slots - self.entries(0))
        if not 1 <= n_tokens <= left:
            raise InvalidInput(f"{n_tokens} tokens don't fit: {left} of {self.layout.context} positions are left")
        self._close()
        self._prompt = n_tokens

    def prefill(self, layer: int, q: F32, k: F32, v: F32, out: F32) -> None:
        """The next tokens of the prompt in a layer: q, out float32 (n, n_heads × head_dim), k, v (n, n_kv_heads ×
        head_dim), rotated, n at most ``chunk``."""
        work, before = self._work, int(self._staged[0])
        if before == 0:
            work.observed[...] = 0
            if self._mass is not None:
                n = self._count[layer, 0]
                work.observed[:, :n] = self._mass[layer, :, :n]
        ops.kv_append(k, v, work.keys, work.values, STAGED, self.layout.context, before)
        self._staged[:] = before + len(q)
        start = 0
        while start < len(q):
            observed = self._n_until_observed(before + start)
            n = min(len(q) - start, OBSERVED_TOKENS if observed == 0 else observed or len(q))
            part = slice(start, start + n)
            self._attend(layer, q[part], out[part], before + start, observe=observed == 0)
            start += n

    def _n_until_observed(self, token: int) -> int | None:
        """How many tokens of the prompt from ``token`` on are not observed; None if all."""
        if self.layout.n_observed == 0:
            return None
        assert self.layout.policy is not None
        first = 0 if self.layout.observes == "mass" else max(0, self._prompt - self.layout.policy.window)
        return max(0, first - token)

    def _attend(self, layer: int, q: F32, out: F32, n_before: int, *, observe: bool) -> None:
        work, h = self._work, self.layout.heads
        n, old = len(q), int(self._count[layer, 0])
        sums, tops, totals = work.sums[:n], work.tops[:n], work.totals[:n]
        sums[...], tops[...], totals[...] = 0, -np.inf, 0
        kept: list[tuple[F32, I32, slice]] = []
        for segment, counts, stride, before, at in (
            (self._segments[layer], self._count[layer], self.layout.slots, -1, slice(0, old)),
            (self._staging, self._staged, self.layout.context, n_before, slice(old, old + int(self._staged[0]))),
        ):
            if not counts[0]:
                continue
            scores = None
            if observe:
                first = 0 if before < 0 else h.n_heads * n * self.layout.slots
                scores = work.scores[first : first + h.n_heads * n * stride].reshape(h.n_heads, n, stride)
                kept.append((scores, counts, at))
            ops.attend_segment(
                q, segment, sums, tops, totals,
                n_before=before, scale=h.scale, softcap=h.softcap, scores=scores, scratch=work.scratch,
            )  # fmt: skip
        np.divide(sums, totals[..., None], out=out.reshape(sums.shape))
        for scores, counts, at in kept:
            self._observe(scores, tops, totals, counts, work.observed[:, at])

    def _observe(self, scores: F32, tops: F32, totals: F32, counts: I32, observed: F32) -> None:
        rows = np.zeros((len(observed), scores.shape[2]), np.float32)
        ops.attention_mass(scores, tops, totals, np.full(len(rows), counts[0], np.int32), rows)
        observed += rows[:, : observed.shape[1]]

    def settle(self, layer: int) -> None:
        """The prompt has passed the layer: the policy chooses what stays. Behind the last layer the prompt is done."""
        layout, work = self.layout, self._work
        old, new = int(self._count[layer, 0]), int(self._staged[0])
        n_tokens = self.n_tokens + self._prompt
        position = np.empty((layout.heads.n_kv_heads, old + new), np.int32)
        position[:, :old] = self._position[layer, :, :old]
        position[:, old:] = np.arange(self.n_tokens, n_tokens)
        if layout.policy is None:
            chosen = np.broadcast_to(np.arange(old + new), position.shape)
        else:
            order = np.argsort(position, axis=1)
            sharing = layout.n_observed // layout.heads.n_kv_heads
            observed = None
            if sharing:
                ordered = np.repeat(order, sharing, axis=0)
                observed = np.take_along_axis(work.observed[:, : old + new], ordered, axis=1)
            seen = Seen(np.take_along_axis(position, order, axis=1), n_tokens, observed, layer)
            chosen = np.take_along_axis(order, layout.policy.choose(seen), axis=1)
        if chosen.shape[1] < old + new:
            self._evicted_at = n_tokens
        for head, stay in enumerate(chosen):
            self._place(layer, head, stay, position[head])
        self._count[layer] = chosen.shape[1]
        self._staged[:] = 0
        if layer + 1 == layout.n_layers:
            self.n_tokens, self._prompt = n_tokens, 0

    def _place(self, layer: int, head: int, stay: npt.NDArray[np.int64], position: I32) -> None:
        """Give entries ``stay`` the first slots: those that have one keep it, and staged ones come in between."""
        old = int(self._count[layer, 0])
        kept, new = stay[stay < old], stay[stay >= old]
        free = np.setdiff1d(np.arange(len(stay)), kept[kept < len(stay)])
        movers = kept[kept >= len(stay)]
        self._move(layer, head, movers, free[: len(movers)])
        slots = free[len(movers) :]
        self._position[layer, head, slots] = position[new]
        if self._mass is not None:
            self._mass[layer, head, slots] = self._work.observed[head, new]
            untouched = np.setdiff1d(kept, movers)
            self._mass[layer, head, untouched] = self._work.observed[head, untouched]
            self._mass[layer, head, free[: len(movers)]] = self._work.observed[head, movers]
        for start in range(0, len(new), MOVED_ROWS):
            part = slice(start, start + MOVED_ROWS)
            for staged, stored in ((self._work.keys, self._keys), (self._work.values, self._values)):
                rows = staged[head, new[part] - old]
                if self._format == STAGED:
                    stored[layer, head, slots[part]] = rows
                    continue
                floats = rows.view(np.float16).astype(np.float32)
                own = slots[None, part].astype(np.int32)
                ops.kv_write(floats, stored[layer, head : head + 1], self._format, own)

    def _move(self, layer: int, head: int, source: npt.NDArray[np.int64], to: npt.NDArray[np.int64]) -> None:
        for array in (self._keys, self._values, self._position, self._mass):
            if array is not None and len(source):
                array[layer, head, to] = array[layer, head, source]

    # --- decoding ---------------------------------------------------------------------------------------------------

    def check_step(self) -> None:
        """Refuse one more token where no slot is left.

        Raises
        ------
        InvalidInput : so it is.
        """
        if self._free is None and self._count[-1, 0] == self.layout.slots:
            raise InvalidInput(
                f"all {self.layout.slots} slots are taken",
                cure="state a larger context, or more room for what is decoded",
            )

    def step(self, layer: int, q: F32, k: F32, v: F32, out: F32) -> None:
        """One token in a layer: q, out float32 (1, n_heads × head_dim), k, v (1, n_kv_heads × head_dim), rotated;
        ``check_step`` comes before the first layer."""
        slots = self._free[layer] if self._free is not None else self._count[layer]
        if self._free is None:
            slots = slots.copy()
            self._count[layer] += 1
        heads = np.arange(len(slots))
        self._position[layer, heads, slots] = self.n_tokens
        if self._mass is not None:
            self._mass[layer, heads, slots] = 0
        for row, stored in ((k, self._keys), (v, self._values)):
            ops.kv_write(row, stored[layer], self._format, slots[:, None])
        work, h = self._work, self.layout.heads
        sums, tops, totals = work.sums[:1], work.tops[:1], work.totals[:1]
        sums[...], tops[...], totals[...] = 0, -np.inf, 0
        scores = None
        if self._mass is not None:
            scores = work.scores[: h.n_heads * self.layout.slots].reshape(h.n_heads, 1, -1)
        ops.attend_segment(
            q, self._segments[layer], sums, tops, totals,
            scale=h.scale, softcap=h.softcap, scores=scores, scratch=work.scratch,
        )  # fmt: skip
        np.divide(sums, totals[..., None], out=out.reshape(sums.shape))
        if self._mass is not None:
            assert scores is not None
            ops.attention_mass(scores, tops, totals, self._count[layer], self._mass[layer])

    def stepped(self) -> None:
        """The token has passed all layers: the policy may send entries away."""
        self.n_tokens += 1
        self._free = None
        if self.layout.policy is None:
            return
        n = int(self._count[0, 0])
        mass = None if self._mass is None else self._mass[:, :, :n]
        gone = self.layout.policy.evict(self._position[:, :, :n], mass, self.n_tokens)
        if gone is None:
            return
        self._evicted_at = self.n_tokens
        if gone.shape[-1] == 1:
            self._free = gone[..., 0]
            return
        for layer, head in np.ndindex(*gone.shape[:2]):
            left = np.delete(np.arange(n), gone[layer, head])
            free = np.setdiff1d(gone[layer, head], left[len(left) :])
            free = free[free < len(left)]
            self._move(layer, head, left[left >= len(left)], free)
        self._count -= gone.shape[-1]

    def _close(self) -> None:
        """Fill the slots that an eviction left free with the last entries."""
        if self._free is None:
            return
        last = self._count[0, 0] - 1
        for layer, head in np.ndindex(*self._free.shape):
            self._move(layer, head, np.array([last]), self._free[layer, head : head + 1].astype(np.int64))
        self._count -= 1
        self._free = None
