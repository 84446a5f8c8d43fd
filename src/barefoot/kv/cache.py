"""The compressed KV cache of one sequence: entries of each layer and key head, chosen by a policy, in a storage.

A prompt passes layer by layer. While one layer is passed, the prompt's keys and values stand in *staging*, in half
precision, as far as they are there; behind the last token the policy chooses what of them and of the earlier entries
stays, and that goes to the storage. So one layer is whole at a time, and all others have what they keep. A decoded
token's entry goes to the storage, too, and the policy may send others away then.

Softmax is over what is there: entries that are gone stop existing, but for what they leave in others. Keys keep the
rotation of their positions, and positions go on counting all tokens.

Where budgets follow what is measured, the layers that have passed a first prompt share the budget of all, so that each
one's shrinks as further ones come: the storage never holds more than it will, and what stays is what would stay if all
had waited, since the highest scores are among the highest of more.

Layers that keep the same entries (``KVStore.groups``) choose once, behind the last of them, from the sum of what their
attention gave; until then they are whole, all in staging.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.kv import budgets
from barefoot.kv.attending import attend
from barefoot.kv.course import Course
from barefoot.kv.layout import OBSERVED_TOKENS, Layout, Workspace
from barefoot.kv.merging import PromptRows, StoredRows, merge
from barefoot.kv.policies import Seen, by_layer
from barefoot.kv.storage import F32, I32, STAGED, U8, Part, Storage, Take, check_positions
from barefoot.kv.turning import Turning


class Staging(NamedTuple):
    """Where a prompt's keys and values of one layer stand while it passes."""

    keys: U8
    values: U8
    part: Part


class Cache:
    """One sequence's entries.

    Parameters
    ----------
    workspace : shared with other sequences of the same layout; one passes at a time.
    take : gives zeroed bytes.
    turnings : the rotary embedding of each layer; needed where a policy has entries that queries turn to meet.
    """

    def __init__(
        self, layout: Layout, workspace: Workspace, take: Take, turnings: Sequence[Turning] | None = None
    ) -> None:
        assert turnings is not None or not layout.n_anchored
        self._turnings = turnings
        h, self.layout, self._work = layout.heads, layout, workspace
        self._own = layout.storage(take)
        self._lender: Cache | None = None  # whose entries these are, until either of both changes
        self._borrowers: list[Cache] = []
        self._groups = [group for group in layout.groups for _ in group]  # of each layer
        self._choosing = [group[-1] for group in layout.groups]  # layers behind which entries are chosen
        self._staged: I32 = np.zeros(h.n_kv_heads, np.int32)
        # Of the first layer of a group, the second, …
        self._staging = [self._stage(workspace, i) for i in range(max(map(len, layout.groups)))]
        self._start()

    def _stage(self, work: Workspace, i: int) -> Staging:
        h = self.layout.heads
        own = slice(i * h.n_kv_heads, (i + 1) * h.n_kv_heads)
        keys, values, dim = work.keys[own], work.values[own], h.head_dim
        segment = ops.Segment(STAGED, keys, STAGED, values, key_dim=dim, value_dim=dim, counts=self._staged)
        return Staging(keys, values, Part(segment, self._staged))

    def _start(self) -> None:
        """Be of no tokens."""
        self._course = Course.start(self.layout)
        self._prompt = 0  # tokens of the prompt that passes, 0 for none
        self._observed_from = 0  # the first token of a prompt that is observed
        self._chooses = False  # whether the policy chooses among its entries
        if (slots := self._course.slots(self.layout)) is not None:
            self._own.resize(slots)

    @property
    def n_tokens(self) -> int:
        """Tokens of the sequence."""
        return self._course.n_tokens

    @property
    def storage(self) -> Storage:
        """Where the entries are: in another cache's storage, as long as neither has changed since a fork."""
        return self._own if self._lender is None else self._lender.storage

    def fork(self, into: Cache) -> None:
        """Let ``into`` have what this cache has. Bytes are copied when either of both changes for the first time."""
        into.clear()
        into._lender, into._course = self, self._course.copy()
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

    def clear(self) -> None:
        """Forget all entries, and the prompt that passes."""
        for borrower in list(self._borrowers):
            borrower._about_to_change()
        self._leave()
        self._own.clear()
        self._staged[:] = 0
        self._start()

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
        observes = self.layout.observes in ("mass", "strikes")
        if observes or n < self._course.evicted_at:
            why = "has seen what came behind" if observes else "has sent entries away since"
            raise InvalidInput(
                f"can't go back from {self.n_tokens} tokens to {n}: {self.layout.policy} {why}",
                cure="reset, and prefill the kept tokens again",
            )
        self._about_to_change()
        self.storage.close()
        for layer in range(self.layout.n_layers):
            self.storage.trim(layer, n)
        self._course.n_tokens = n
        self._course.prompt_ends = [end for end in self._course.prompt_ends if end <= n]

    # --- in a file ---------------------------------------------------------------------------------------------------

    def header(self) -> dict[str, Any]:
        """How much there is, as JSON: what :meth:`restore` needs for :meth:`held` to be of the same shapes."""
        return {**self._course.header(), "entries": self.storage.counters()}

    def held(self) -> dict[str, npt.NDArray[Any]]:
        """All that is there, by name: views that can be written when ``restore`` has made room."""
        return self.storage.held()

    def restore(self, header: Mapping[str, Any]) -> None:
        """Have as much as the header says; then :meth:`held` is to be filled, and :meth:`check` to be called.

        Raises
        ------
        CorruptFile : that isn't possible. The cache is empty then.
        """
        self.clear()
        try:
            self._course = Course.restored(header, self.layout)
            if (slots := self._course.slots(self.layout)) is not None:
                self._own.resize(slots)
            entries = header.get("entries")
            self._own.restore(entries if isinstance(entries, dict) else {})
        except CorruptFile:
            self.clear()
            raise

    def check(self) -> None:
        """Refuse what was filled in if it can't be: positions that are none, and what the storage knows.

        Raises
        ------
        CorruptFile : so it is. The cache is empty then.
        """
        try:
            for layer in range(self.layout.n_layers):
                check_positions(self.storage.position(layer), self.n_tokens, f"layer {layer}")
            self.storage.check(self.n_tokens)
        except CorruptFile:
            self.clear()
            raise

    # --- a prompt ---------------------------------------------------------------------------------------------------

    def begin(self, n_tokens: int) -> None:
        """``n_tokens`` are about to pass all layers, one layer after the other.

        Raises
        ------
        InvalidInput : fewer positions are left, or fewer slots where nothing is chosen.
        """
        self._about_to_change()
        self.storage.close()
        left = self.layout.context - self.n_tokens
        # What can't go makes no room for others.
        self._chooses = self.layout.policy is not None and (self.storage.lets_go or not self.n_tokens)
        if not self._chooses:
            left = min(left, *(self.storage.room(layer) for layer in range(self.layout.n_layers)))
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
        if policy.observes in ("mass", "sums"):
            return 0
        return max(0, n - policy.n_observed(self.storage.n(0) + n))

    def prefill(self, layer: int, q: F32, k: F32, v: F32, out: F32) -> None:
        """The next tokens of the prompt in a layer: q, out float32 (n, n_heads × head_dim), k, v (n, n_kv_heads ×
        head_dim), rotated, n at most ``chunk``."""
        work, before, staging = self._work, int(self._staged[0]), self._staging_of(layer)
        if before == 0 and layer == self._groups[layer][0]:
            work.observed[...] = 0
            mass = self.storage.mass(layer)
            if mass is not None:
                work.observed[:, : mass.shape[1]] = mass
        self.storage.see(layer, q, self._prompt - before - len(q))
        ops.kv_append(k, v, staging.keys, staging.values, STAGED, self.layout.context, before)
        self._staged[:] = before + len(q)
        start = 0
        while start < len(q):
            ahead = max(0, self._observed_from - before - start)
            n = min(len(q) - start, OBSERVED_TOKENS if ahead == 0 else ahead)
            part = slice(start, start + n)
            self._attend(layer, q[part], out[part], before + start, observe=ahead == 0)
            start += n

    def _staging_of(self, layer: int) -> Staging:
        return self._staging[layer - self._groups[layer][0]]

    def _attend(self, layer: int, q: F32, out: F32, n_before: int, *, observe: bool) -> None:
        work, h, n, staging = self._work, self.layout.heads, len(q), self._staging_of(layer)
        if not observe and not self.storage.n(layer):
            ops.attention(
                q, staging.keys, staging.values, STAGED, out,
                n_heads=h.n_heads, n_kv_heads=h.n_kv_heads, head_dim=h.head_dim, capacity=self.layout.context,
                n_past=n_before, n_tokens=n, scale=h.scale, softcap=h.softcap, activations=self.layout.activations,
                scratch=work.scratch,
            )  # fmt: skip
            return
        parts = [*self._parts_of(layer, self.n_tokens - self.storage.n(layer)), staging.part]
        observed, even, old = work.observed if observe else None, None, self.storage.n(layer)
        if self.layout.n_parts:
            behind = sum(int(part.counts[0]) for part in parts[:-1])
            even = (1 / (behind + n_before + 1 + np.arange(n))).astype(np.float32)
            if observed is not None:  # no strikes before an entry is there
                new = np.arange(int(staging.part.counts[0]) - n_before, dtype=np.float32)
                observed[:, old + n_before : old + n_before + len(new)] -= np.minimum(new, n)
        attend(work, h, parts, q, out, observed=observed, n_before=n_before, even=even)

    def _parts_of(self, layer: int, n_gone: int) -> list[Part]:
        """The storage's parts; queries meet the anchored ones as if those that have gone had not been."""
        parts = list(self.storage.parts(layer))
        if self._turnings is not None and self.layout.n_anchored and n_gone:
            turning, head_dim = self._turnings[layer], self.layout.heads.head_dim
            parts[0] = parts[0]._replace(query=lambda q: turning.turn(q, head_dim, -n_gone))
        return parts

    def settle(self, layer: int) -> None:
        """The prompt has passed the layer, and those that choose with it: the policy chooses what stays. Behind the
        last layer the prompt is done."""
        group = self._groups[layer]
        if layer != group[-1]:
            self._staged[:] = 0
            return
        storage, work = self.storage, self._work
        old, new = storage.n(layer), int(self._staged[0])
        n_tokens = self.n_tokens + self._prompt
        position = np.empty((self.layout.heads.n_kv_heads, old + new), np.int32)
        position[:, :old] = storage.position(layer)
        position[:, old:] = np.arange(self.n_tokens, n_tokens)
        observed, bias = work.observed[:, : old + new], self._biases(layer, new)
        stay = np.broadcast_to(np.arange(old + new, dtype=np.int32), position.shape)
        if self._chooses:
            if self._course.rules[layer].layers == "measured" and self.n_tokens == 0:
                self._share_budgets(observed, n_tokens)
            stay = self._chosen(layer, position, observed, bias, n_tokens)
        n_staged = len(group) * self.layout.heads.n_kv_heads
        storage.place(layer, stay, position, work.keys[:n_staged], work.values[:n_staged])
        chosen = stay.shape[1] < old + new
        if chosen:
            self._course.evicted_at = n_tokens
        self._take_observed(layer, position, observed, bias, chosen=chosen)
        self._staged[:] = 0
        if layer + 1 == self.layout.n_layers:
            # Strikes of the prompt are the only part there is.
            began = n_tokens if chosen else self.n_tokens + self._observed_from
            self._course.parts, self._course.part = [began] * len(self._course.parts), 0
            self._course.n_tokens, self._prompt = n_tokens, 0
            self._course.prompt_ends.append(n_tokens)

    def _biases(self, layer: int, n_new: int) -> F32 | None:
        """Of a layer's entries, and zeros for so many new ones; None where entries have none."""
        bias = self.storage.bias(layer)
        return None if bias is None else np.pad(bias, ((0, 0), (0, n_new)))

    def _chosen(self, layer: int, position: I32, observed: F32, bias: F32 | None, n_tokens: int) -> I32:
        """Entries of a layer that stay, (n_kv_heads, n_kept); others have joined them where they lie, and in ``bias``.

        The entries are the storage's, and then those that are staged.
        """
        policy = self._course.rules[layer]
        order = np.argsort(position, axis=1).astype(np.int32)
        rows = PromptRows(self.storage, layer, self._work.keys, self._work.values, order)
        ordered = None
        if self.layout.n_observed:
            sharing = len(observed) // len(position)
            ordered = np.take_along_axis(observed, np.repeat(order, sharing, axis=0), axis=1)
        seen = Seen(
            position=np.take_along_axis(position, order, axis=1),
            n_tokens=n_tokens,
            observed=ordered,
            layer=layer,
            n_prompt=n_tokens,
            bias=None if bias is None else np.take_along_axis(bias, order, axis=1),
            carried=self._course.carried[layer],
            keys=rows.keys,
        )
        kept = policy.choose(seen)
        if policy.merges and kept.shape[1] < seen.n:
            found = merge(policy, seen, kept, rows)
            if found.carried is not None:
                self._course.carried[layer] = found.carried
            if bias is not None and found.bias is not None:
                np.put_along_axis(bias, order, found.bias, axis=1)
        return np.take_along_axis(order, kept, axis=1)

    def _share_budgets(self, observed: F32, n_tokens: int) -> None:
        """The next layer of the first prompt shares the budget of all with those before it, of which some entries go
        for that."""
        layout, storage = self.layout, self.storage
        assert layout.policy is not None
        self._course.weights.append(budgets.density(observed))
        rules = by_layer(layout.policy, self._course.weights, layout.n_layers, layout.context)
        self._course.rules[: len(rules)] = rules
        for layer, rule in enumerate(rules[:-1]):
            if storage.n(layer) > rule.keep:
                position, mass, bias = storage.position(layer).copy(), storage.mass(layer), storage.bias(layer)
                assert mass is not None
                stay = self._chosen(layer, position, mass, bias, n_tokens)
                storage.place(layer, stay, position, self._work.keys, self._work.values)
        storage.resize([rule.slots(layout.context) for rule in rules] + [0] * (layout.n_layers - len(rules)))

    def _take_observed(self, layer: int, position: I32, observed: F32, bias: F32 | None, *, chosen: bool) -> None:
        """Entries keep what was observed of them, wherever they lie now; strikes count anew where some were chosen."""
        storage, kept = self.storage, []
        mass, strikes, biases = storage.mass(layer), storage.strikes(layer), storage.bias(layer)
        if mass is not None:
            kept.append((mass, observed))
        if biases is not None and bias is not None:
            kept.append((biases, bias))
        if strikes is not None:
            strikes[...] = 0
            kept += [] if chosen else [(strikes[0], observed)]
        if not kept:
            return
        for head, there in enumerate(storage.position(layer)):
            order = np.argsort(position[head])
            found = order[np.searchsorted(position[head], there, sorter=order)]
            for into, numbers in kept:
                into[head] = numbers[head, found]

    # --- decoding ---------------------------------------------------------------------------------------------------

    def check_step(self) -> None:
        """Refuse one more token where no slot is left.

        Raises
        ------
        InvalidInput : so it is.
        """
        if any(self.storage.room(layer) < 1 for layer in range(self.layout.n_layers)):
            raise InvalidInput(
                f"all {self.layout.n_slots} slots are taken",
                cure="state a larger context, or more room for what is decoded",
            )

    def step(self, layer: int, q: F32, k: F32, v: F32, out: F32) -> None:
        """One token in a layer: q, out float32 (1, n_heads × head_dim), k, v (1, n_kv_heads × head_dim), rotated;
        ``check_step`` comes before the first layer."""
        if layer == 0:
            self._about_to_change()
        storage = self.storage
        storage.append(layer, k, v, self.n_tokens)
        mass, strikes = storage.mass(layer), storage.strikes(layer)
        parts = self._parts_of(layer, self.n_tokens + 1 - storage.n(layer))
        even = None if strikes is None else np.array([1 / sum(int(part.counts[0]) for part in parts)], np.float32)
        observed = mass if strikes is None else self._work.no_strikes(strikes.shape[2])
        attend(self._work, self.layout.heads, parts, q, out, observed=observed, even=even)
        if strikes is not None and observed is not None:
            strikes[self._course.part] += observed.astype(np.uint16)

    def _begin_part(self) -> None:
        """Count strikes apart from now on, in the place of the eldest part."""
        self._course.part = (self._course.part + 1) % len(self._course.parts)
        self._course.parts[self._course.part] = self.n_tokens
        for layer in range(self.layout.n_layers):
            strikes = self.storage.strikes(layer)
            assert strikes is not None
            strikes[self._course.part] = 0

    def _observed(self, layer: int) -> F32 | None:
        """What the policy asks for of a layer's entries: mass, or strikes of the last queries."""
        strikes = self.storage.strikes(layer)
        if strikes is None:
            return self.storage.mass(layer)
        counted = np.zeros(strikes.shape[1:], np.float32)
        for part, began in zip(strikes, self._course.parts, strict=True):
            if began >= self.n_tokens - self._course.rules[layer].window:
                counted += part
        return counted

    def stepped(self) -> None:
        """The token has passed all layers: the storage may seal, and the policy may send entries away."""
        self._course.n_tokens += 1
        goes, rules = False, self._course.rules
        for layer in self._choosing:
            self.storage.stepped(layer)
        rows = self._rows()
        if rows is not None:
            position, observed = rows
            goes = rules[0].sends_away(position.shape[1], self.n_tokens)
            if goes:
                self.storage.drop_rows(rules[0].evict(Seen(position, self.n_tokens, observed)))
        elif rules:
            for layer in self._choosing:
                if rules[layer].sends_away(self.storage.n(layer), self.n_tokens):
                    goes = True
                    self._send_away(layer)
        if goes:
            self._course.evicted_at = self.n_tokens
        if self._course.parts and (goes or self._course.rules[0].begins_part(self.storage.n(0))):
            self._begin_part()

    def _rows(self) -> tuple[I32, F32 | None] | None:
        """All layers' rows, where one call chooses of all of them what goes."""
        rules = self._course.rules
        if not rules or not rules[0].evicts_rows or len(self._choosing) < self.layout.n_layers:
            return None
        return self.storage.rows() if all(rule is rules[0] or rule == rules[0] for rule in rules) else None

    def _send_away(self, layer: int) -> None:
        policy, storage = self._course.rules[layer], self.storage
        bias, rows = storage.bias(layer), StoredRows(storage, layer)
        seen = Seen(
            position=storage.position(layer),
            n_tokens=self.n_tokens,
            observed=self._observed(layer),
            layer=layer,
            n_prompt=self._course.prompt_ends[-1] if self._course.prompt_ends else 0,
            bias=bias,
            carried=self._course.carried[layer],
            keys=rows.keys,
        )
        gone = policy.evict(seen)
        if policy.merges_tokens:
            stays = np.ones(seen.position.shape, bool)
            np.put_along_axis(stays, gone, False, axis=1)
            stay = np.nonzero(stays)[1].reshape(len(stays), -1).astype(np.int32)
            found = merge(policy, seen, stay, rows)
            if found.carried is not None:
                self._course.carried[layer] = found.carried
            if bias is not None and found.bias is not None:
                bias[...] = found.bias
        storage.drop(layer, gone)
