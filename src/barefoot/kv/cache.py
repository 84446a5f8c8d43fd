"""The compressed KV cache of one sequence: entries of each layer and key head, chosen by a policy, in a storage.

A prompt passes layer by layer. While one layer is passed, the prompt's keys and values stand in *staging*, in half
precision, as far as they are there; behind the last token the policy chooses what of them and of the earlier entries
stays, and that goes to the storage. So one layer is whole at a time, and all others have what they keep. A decoded
token's entry goes to the storage, too, and the policy may send others away then.

Softmax is over what is there: entries that are gone stop existing. Keys keep the rotation of their positions, and
positions go on counting all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Term
from barefoot.kv import sealed, slots
from barefoot.kv.policies import Observation, Policy, Seen
from barefoot.kv.storage import F32, I32, STAGED, Array, Heads, Storage, Take, zeros
from barefoot.kv.stores import KVStore
from barefoot.kv.stores.kivi import Kivi

OBSERVED_TOKENS = 8  # of a prompt whose scores are held at a time

# Bytes of numpy arrays that come and go while a layer's entries are chosen, and then placed; tests measure them. For
# each entry and key head: to choose, to choose by votes, to place; and for each further query head that votes. And for
# each number of the rows that are decoded at a time, where they are sealed and where they go to slots.
CHOOSE, CHOOSE_BY_VOTE, PLACE, VOTE, SEALED, MOVED = 34, 37, 14, 15, 21, 8


@dataclass(frozen=True)
class Layout:
    """What a cache of ``n_layers`` layers is made of, before anything is allocated."""

    heads: Heads
    n_layers: int
    context: int
    policy: Policy | None
    store: KVStore
    chunk: int = 64
    activations: str = "float32"  # how a prompt is attended to, as in ``ops.attention``

    @property
    def n_slots(self) -> int:
        """The most entries of a key head."""
        return self.context if self.policy is None else self.policy.slots(self.context)

    @property
    def observes(self) -> Observation:
        return "nothing" if self.policy is None else self.policy.observes

    @property
    def n_observed(self) -> int:
        """Rows of what is observed of a layer: a key head's, or a query head's."""
        n = self.heads.n_kv_heads
        return {"nothing": 0, "mass": n, "strikes": n, "votes": self.heads.n_heads}[self.observes]

    @property
    def n_parts(self) -> int:
        """In which strikes are counted; 0 where they aren't."""
        return self.policy.n_parts if self.policy is not None and self.observes == "strikes" else 0

    def own(self) -> tuple[Array, ...]:
        """The arrays of a sequence."""
        if isinstance(self.store, Kivi):
            return sealed.arrays(self.heads, self.n_layers, self.n_slots, self.store)
        mass = self.observes == "mass"
        return slots.arrays(self.heads, self.n_layers, self.n_slots, self.store, mass=mass, n_parts=self.n_parts)

    def shared(self, n_threads: int) -> tuple[Array, ...]:
        """What passes use in turn: staged keys and values, what is observed of all entries, the state of a pass, scores
        of the tokens that are observed, scratch."""
        h, widest = self.heads, max(self.n_slots, self.context)
        staged = Array("kv staging", h.n_kv_heads * self.context, ops.kv_row_bytes(STAGED, h.head_dim))
        both = self.n_slots + self.context
        n_scores = min(self.chunk, OBSERVED_TOKENS) * h.n_heads * both if self.n_observed else 0
        return (
            staged,
            staged,
            Array("kv observed", self.n_observed * self.context, 4),
            Array("kv state", self.chunk * h.n_heads * (h.head_dim + 2), 4),
            Array("kv scores", n_scores, 4),
            Array("kv observed now", self.n_observed * widest, 4),
            Array("kv scratch", self._scratch_bytes(n_threads), 1),
        )

    def _scratch_bytes(self, n_threads: int) -> int:
        h = self.heads
        sizes = (
            ops.attention_scratch_bytes(n, h.n_heads, h.n_kv_heads, h.head_dim, self.activations, n_threads=n_threads)
            for n in {1, min(self.chunk, OBSERVED_TOKENS), self.chunk}
        )
        return max(sizes)

    def passing(self) -> Term:
        """What choosing and placing takes for a while."""
        h, most = self.heads, self.context
        each = CHOOSE * h.n_kv_heads
        if self.observes == "votes":
            each = CHOOSE_BY_VOTE * h.n_kv_heads + VOTE * (h.n_heads - h.n_kv_heads)
        choosing = 0 if self.policy is None else most * each
        if isinstance(self.store, Kivi):
            decoding = SEALED * h.n_kv_heads * self.store.residual * h.head_dim
        else:
            decoding = MOVED * slots.MOVED_ROWS * h.head_dim
        return Term("kv choosing", max(choosing, PLACE * h.n_kv_heads * most + decoding), 1)

    def terms(self) -> tuple[Term, ...]:
        """Bytes that stay while a sequence lives."""
        return tuple(array.term for array in self.own())

    def storage(self, take: Take) -> Storage:
        if isinstance(self.store, Kivi):
            return sealed.Sealed(self.heads, self.n_layers, self.n_slots, self.store, take)
        mass = self.observes == "mass"
        return slots.Slots(self.heads, self.n_layers, self.n_slots, self.store, take, mass=mass, n_parts=self.n_parts)


class Workspace:
    """The arrays that all layers, and all sequences, use in turn."""

    def __init__(self, layout: Layout, take: Take, n_threads: int) -> None:
        keys, values, observed, state, scores, now, scratch = layout.shared(n_threads)
        h, n = layout.heads, layout.chunk
        rows = (h.n_kv_heads, layout.context, keys.n_bytes)
        self.keys, self.values = zeros(take, keys, rows), zeros(take, values, rows)
        self.observed: F32 = zeros(take, observed, (layout.n_observed, layout.context), np.float32)
        floats = zeros(take, state, (n * h.n_heads, h.head_dim + 2), np.float32).reshape(-1)
        ends = np.cumsum([n * h.n_heads * width for width in (h.head_dim, 1, 1)])
        self.sums = floats[: ends[0]].reshape(n, h.n_heads, h.head_dim)
        self.tops = floats[ends[0] : ends[1]].reshape(n, h.n_heads)
        self.totals = floats[ends[1] :].reshape(n, h.n_heads)
        self.scores = zeros(take, scores, (scores.count,), np.float32)
        self._now: F32 = zeros(take, now, (now.count,), np.float32)
        self.scratch = zeros(take, scratch, (scratch.count,))

    def now(self, stride: int) -> F32:
        """Zeros for what some tokens observe of ``stride`` entries, (n_observed, stride)."""
        n = len(self.observed)
        rows = self._now[: n * stride].reshape(n, stride)
        rows[...] = 0
        return rows


class Cache:
    """One sequence's entries.

    Parameters
    ----------
    workspace : shared with other sequences of the same layout; one passes at a time.
    take : gives zeroed bytes.
    """

    def __init__(self, layout: Layout, workspace: Workspace, take: Take) -> None:
        h, self.layout, self._work = layout.heads, layout, workspace
        self._own = layout.storage(take)
        self._lender: Cache | None = None  # whose entries these are, until either of both changes
        self._borrowers: list[Cache] = []
        self._staged: I32 = np.zeros(h.n_kv_heads, np.int32)
        keys, values, dim = workspace.keys, workspace.values, h.head_dim
        self._staging = ops.Segment(STAGED, keys, STAGED, values, key_dim=dim, value_dim=dim, counts=self._staged)
        self.n_tokens = 0
        self._prompt = 0  # tokens of the prompt that passes, 0 for none
        self._observed_from = 0  # the first of them that is
        self._chooses = False  # whether the policy chooses among its entries
        self._evicted_at = 0  # tokens that there were when an entry went last
        self._parts = [0] * layout.n_parts  # tokens that there were when each part of the strikes began
        self._part = 0  # the present one

    @property
    def storage(self) -> Storage:
        """Where the entries are: in another cache's storage, as long as neither has changed since a fork."""
        return self._own if self._lender is None else self._lender.storage

    def fork(self, into: Cache) -> None:
        """Let ``into`` have what this cache has. Bytes are copied when either of both changes for the first time."""
        into.clear()
        into._lender, into.n_tokens, into._evicted_at = self, self.n_tokens, self._evicted_at
        into._parts, into._part = list(self._parts), self._part
        self._borrowers.append(into)

    def _about_to_change(self) -> None:
        for borrower in list(self._borrowers):
            borrower._about_to_change()
        if self._lender is not None:
            self._own.copy(self._lender.storage)
            self._leave()

    def _leave(self) -> None:
        if self._lender is not None:
            self._lender._borrowers.remove(self)
            self._lender = None

    @property
    def _mass(self) -> F32 | None:
        return self.storage.mass if isinstance(self.storage, slots.Slots) else None

    def _close(self) -> None:
        if isinstance(self.storage, slots.Slots):
            self.storage.close()

    def clear(self) -> None:
        """Forget all entries, and the prompt that passes."""
        for borrower in list(self._borrowers):
            borrower._about_to_change()
        self._leave()
        self._own.clear()
        self._staged[:] = 0
        self.n_tokens = self._prompt = self._evicted_at = self._part = 0
        self._parts = [0] * len(self._parts)

    def trim(self, n: int) -> None:
        """Go back to the first ``n`` tokens.

        Raises
        ------
        InvalidInput : entries have gone since, are quantized together with others, or were observed meanwhile.
        """
        if not 0 <= n <= self.n_tokens:
            raise InvalidInput(f"can keep 0 to {self.n_tokens} tokens, got {n}")
        if n == self.n_tokens:
            return
        if n == 0:
            self.clear()
            return
        observes = self._mass is not None or self.layout.n_parts > 0
        if observes or n < self._evicted_at:
            why = "has seen what came behind" if observes else "has sent entries away since"
            raise InvalidInput(
                f"can't go back from {self.n_tokens} tokens to {n}: {self.layout.policy} {why}",
                cure="reset, and prefill the kept tokens again",
            )
        self._about_to_change()
        self._close()
        for layer in range(self.layout.n_layers):
            self.storage.trim(layer, n)
        self.n_tokens = n

    # --- a prompt ---------------------------------------------------------------------------------------------------

    def begin(self, n_tokens: int) -> None:
        """``n_tokens`` are about to pass all layers, one layer after the other.

        Raises
        ------
        InvalidInput : fewer positions are left, or fewer slots where nothing is chosen.
        """
        self._about_to_change()
        self._close()
        left = self.layout.context - self.n_tokens
        self._chooses = self.layout.policy is not None
        if isinstance(self.storage, sealed.Sealed) and self.n_tokens:
            self._chooses = False  # what is sealed makes no room for others
        if not self._chooses:
            left = min(left, self.layout.n_slots - self.storage.n(0))
        if not 1 <= n_tokens <= left:
            raise InvalidInput(
                f"{n_tokens} tokens don't fit: {left} of {self.layout.context} positions are left",
                cure="shorten the prompt, use a larger context, or reset",
            )
        self._prompt = n_tokens
        self._observed_from = self._first_observed()

    def _first_observed(self) -> int:
        """The first token of the prompt whose attention is observed."""
        policy, n = self.layout.policy, self._prompt
        if policy is None or policy.observes == "nothing" or not self._chooses:
            return n
        if policy.observes == "mass":
            return 0
        return max(0, n - policy.n_observed(self.storage.n(0) + n))

    def prefill(self, layer: int, q: F32, k: F32, v: F32, out: F32) -> None:
        """The next tokens of the prompt in a layer: q, out float32 (n, n_heads × head_dim), k, v (n, n_kv_heads ×
        head_dim), rotated, n at most ``chunk``."""
        work, before = self._work, int(self._staged[0])
        if before == 0:
            work.observed[...] = 0
            if self._mass is not None:
                n = self.storage.n(layer)
                work.observed[:, :n] = self._mass[layer, :, :n]
        ops.kv_append(k, v, work.keys, work.values, STAGED, self.layout.context, before)
        self._staged[:] = before + len(q)
        start = 0
        while start < len(q):
            ahead = max(0, self._observed_from - before - start)
            n = min(len(q) - start, OBSERVED_TOKENS if ahead == 0 else ahead)
            part = slice(start, start + n)
            self._attend(layer, q[part], out[part], before + start, observe=ahead == 0)
            start += n

    def _attend(self, layer: int, q: F32, out: F32, n_before: int, *, observe: bool) -> None:
        work, h, n = self._work, self.layout.heads, len(q)
        if not observe and not self.storage.n(layer):
            ops.attention(
                q, work.keys, work.values, STAGED, out,
                n_heads=h.n_heads, n_kv_heads=h.n_kv_heads, head_dim=h.head_dim, capacity=self.layout.context,
                n_past=n_before, n_tokens=n, scale=h.scale, softcap=h.softcap, activations=self.layout.activations,
                scratch=work.scratch,
            )  # fmt: skip
            return
        sums, tops, totals = work.sums[:n], work.tops[:n], work.totals[:n]
        sums[...], tops[...], totals[...] = 0, -np.inf, 0
        kept: list[tuple[F32, int]] = []
        used = 0
        parts = [(segment, counts, -1) for segment, counts in self.storage.segments(layer)]
        for segment, counts, before in (*parts, (self._staging, self._staged, n_before)):
            scores = None
            if observe:
                shape = (h.n_heads, n, segment.stride)
                size = int(np.prod(shape))
                scores = work.scores[used : used + size].reshape(shape)
                used += size
                kept.append((scores, int(counts[0])))
            ops.attend_segment(
                q, segment, sums, tops, totals,
                n_before=before, scale=h.scale, softcap=h.softcap, scores=scores, scratch=work.scratch,
            )  # fmt: skip
        np.divide(sums, totals[..., None], out=out.reshape(sums.shape))
        at, even = 0, None
        if self.layout.n_parts:
            even = (1 / (self.storage.n(layer) + n_before + 1 + np.arange(n))).astype(np.float32)
        for scores, count in kept:
            mass = work.now(scores.shape[2])
            counts = np.full(len(mass), count, np.int32)
            ops.attention_mass(scores, tops, totals, counts, mass, thresholds=even)
            if even is not None and at == self.storage.n(layer):  # no strikes before an entry is there
                mass[:, :count] -= np.clip(np.arange(count, dtype=np.float32) - n_before, 0, n)
            work.observed[:, at : at + count] += mass[:, :count]
            at += count

    def settle(self, layer: int) -> None:
        """The prompt has passed the layer: the policy chooses what stays. Behind the last layer the prompt is done."""
        old, new = self.storage.n(layer), int(self._staged[0])
        n_tokens = self.n_tokens + self._prompt
        position = np.empty((self.layout.heads.n_kv_heads, old + new), np.int32)
        position[:, :old] = self.storage.position(layer)
        position[:, old:] = np.arange(self.n_tokens, n_tokens)
        stay = self._chosen(layer, position, n_tokens)
        if stay.shape[1] < old + new:
            self._evicted_at = n_tokens
        observed = self._work.observed[:, : old + new]
        self.storage.place(layer, stay, position, self._work.keys, self._work.values)
        chosen = stay.shape[1] < old + new
        if isinstance(self.storage, slots.Slots):
            self._take_observed(self.storage, layer, position, observed, chosen=chosen)
        self._staged[:] = 0
        if layer + 1 == self.layout.n_layers:
            # Strikes of the prompt are the only part there is.
            began = n_tokens if chosen else self.n_tokens + self._observed_from
            self._parts, self._part = [began] * len(self._parts), 0
            self.n_tokens, self._prompt = n_tokens, 0

    def _chosen(self, layer: int, position: I32, n_tokens: int) -> I32:
        every = np.broadcast_to(np.arange(position.shape[1], dtype=np.int32), position.shape)
        policy = self.layout.policy
        if policy is None or not self._chooses:
            return every
        order = np.argsort(position, axis=1).astype(np.int32)
        observed = None
        if self.layout.n_observed:
            sharing = self.layout.n_observed // len(position)
            seen = self._work.observed[:, : position.shape[1]]
            observed = np.take_along_axis(seen, np.repeat(order, sharing, axis=0), axis=1)
        ordered = np.take_along_axis(position, order, axis=1)
        return np.take_along_axis(order, policy.choose(Seen(ordered, n_tokens, observed, layer)), axis=1)

    @staticmethod
    def _take_observed(storage: slots.Slots, layer: int, position: I32, observed: F32, *, chosen: bool) -> None:
        """Entries keep what was observed of them, wherever they lie now; strikes count anew where some were chosen."""
        if storage.strikes is not None:
            storage.strikes[:, layer] = 0
        if storage.mass is None and (storage.strikes is None or chosen):
            return
        for head, there in enumerate(storage.position(layer)):
            order = np.argsort(position[head])
            found = order[np.searchsorted(position[head], there, sorter=order)]
            if storage.mass is not None:
                storage.mass[layer, head, : len(there)] = observed[head, found]
            if storage.strikes is not None:
                storage.strikes[0, layer, head, : len(there)] = observed[head, found]

    # --- decoding ---------------------------------------------------------------------------------------------------

    def check_step(self) -> None:
        """Refuse one more token where no slot is left.

        Raises
        ------
        InvalidInput : so it is.
        """
        waits = isinstance(self.storage, slots.Slots) and self.storage.free is not None
        if not waits and self.storage.n(0) == self.layout.n_slots:
            raise InvalidInput(
                f"all {self.layout.n_slots} slots are taken",
                cure="state a larger context, or more room for what is decoded",
            )

    def step(self, layer: int, q: F32, k: F32, v: F32, out: F32) -> None:
        """One token in a layer: q, out float32 (1, n_heads × head_dim), k, v (1, n_kv_heads × head_dim), rotated;
        ``check_step`` comes before the first layer."""
        if layer == 0:
            self._about_to_change()
        self.storage.append(layer, k, v, self.n_tokens)
        work, h = self._work, self.layout.heads
        sums, tops, totals = work.sums[:1], work.tops[:1], work.totals[:1]
        sums[...], tops[...], totals[...] = 0, -np.inf, 0
        scores = None
        if self._mass is not None or self.layout.n_parts:
            scores = work.scores[: h.n_heads * self.layout.n_slots].reshape(h.n_heads, 1, -1)
        for segment, _ in self.storage.segments(layer):
            ops.attend_segment(
                q, segment, sums, tops, totals,
                scale=h.scale, softcap=h.softcap, scores=scores, scratch=work.scratch,
            )  # fmt: skip
        np.divide(sums, totals[..., None], out=out.reshape(sums.shape))
        if scores is not None:
            self._observe_step(layer, scores, tops, totals)

    def _observe_step(self, layer: int, scores: F32, tops: F32, totals: F32) -> None:
        storage = self.storage
        assert isinstance(storage, slots.Slots)
        if storage.mass is not None:
            ops.attention_mass(scores, tops, totals, storage.counts[layer], storage.mass[layer])
        if storage.strikes is not None:
            struck = self._work.now(scores.shape[2])
            even = np.array([1 / storage.n(layer)], np.float32)
            ops.attention_mass(scores, tops, totals, storage.counts[layer], struck, thresholds=even)
            storage.strikes[self._part, layer] += struck.astype(np.uint16)

    def _begin_part(self, storage: slots.Slots) -> None:
        """Count strikes apart from now on, in the place of the eldest part."""
        assert storage.strikes is not None
        self._part = (self._part + 1) % len(self._parts)
        self._parts[self._part] = self.n_tokens
        storage.strikes[self._part] = 0

    def _observed(self, storage: slots.Slots, layer: int, n: int) -> F32 | None:
        """What the policy asks for of the first ``n`` slots of a layer: mass, or strikes of the last queries."""
        if storage.mass is not None:
            return storage.mass[layer, :, :n]
        if storage.strikes is None:
            return None
        assert self.layout.policy is not None
        strikes = np.zeros((storage.strikes.shape[2], n), np.float32)
        for part, began in zip(storage.strikes, self._parts, strict=True):
            if began >= self.n_tokens - self.layout.policy.window:
                strikes += part[layer, :, :n]
        return strikes

    def stepped(self) -> None:
        """The token has passed all layers: the storage may seal, and the policy may send entries away."""
        self.n_tokens += 1
        if isinstance(self.storage, sealed.Sealed):
            for layer in range(self.layout.n_layers):
                self.storage.seal(layer)
            return
        assert isinstance(self.storage, slots.Slots)
        self.storage.free = None
        policy, storage = self.layout.policy, self.storage
        if policy is None:
            return
        n = storage.n(0)
        goes = policy.sends_away(n)
        if goes:
            self._evicted_at = self.n_tokens
            for layer in range(self.layout.n_layers):
                observed = self._observed(storage, layer, n)
                storage.drop(layer, policy.evict(storage.positions[layer, :, :n], observed, self.n_tokens, layer))
        if self.layout.n_parts and (goes or policy.begins_part(n)):
            self._begin_part(storage)
