"""Which channels keys keep: chosen once for each layer and key head, by the queries that were seen and the keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core import untrusted
from barefoot.core.errors import CorruptFile
from barefoot.kv.policies import top
from barefoot.kv.storage import F32, U16, Array, Shape, Take, zeros
from barefoot.kv.stores.think import Think


class Channels:
    """Of a sequence's layers.

    Attributes
    ----------
    kept : uint16 (n_layers, n_kv_heads, n_kept), ascending in each row.
    """

    @staticmethod
    def arrays(shape: Shape, store: Think) -> tuple[Array, ...]:
        n, dim = shape.n_layers * shape.heads.n_kv_heads, shape.heads.head_dim
        return (Array("kv channels", n * store.n_kept(dim), 2), Array("kv sums of queries", n * dim, 4))

    @staticmethod
    def asking_bytes(shape: Shape, store: Think, n_tokens: int) -> int:
        """Queries of the kept channels, and those of one key head again."""
        h = shape.heads
        return 4 * n_tokens * (h.n_heads + h.n_heads // h.n_kv_heads) * store.n_kept(h.head_dim)

    def __init__(self, shape: Shape, store: Think, take: Take) -> None:
        kept, asked = self.arrays(shape, store)
        heads, n = shape.heads, (shape.n_layers, shape.heads.n_kv_heads)
        self._window, self._n_heads = store.window, heads.n_heads
        self.kept: U16 = zeros(take, kept, (*n, store.n_kept(heads.head_dim)), np.uint16)
        self._asked: F32 = zeros(take, asked, (*n, heads.head_dim), np.float32)  # squares of a prompt's last queries
        self._sums = np.zeros(shape.n_layers, bool)  # whether that prompt is passing
        self._chosen = np.zeros(shape.n_layers, bool)

    def has(self, layer: int) -> bool:
        """Whether the layer's channels are chosen."""
        return bool(self._chosen[layer])

    def see(self, layer: int, q: F32, n_behind: int) -> None:
        """Queries of a prompt, float32 (n, n_heads × head_dim), ``n_behind`` before its end."""
        first = max(0, len(q) - max(0, self._window - n_behind))
        if self.has(layer) or first == len(q):
            return
        if not self._sums[layer]:
            self._asked[layer], self._sums[layer] = 0, True
        n_kv_heads, dim = self._asked.shape[1:]
        last = q[first:].reshape(len(q) - first, n_kv_heads, -1, dim)
        self._asked[layer] += np.einsum("nhgd,nhgd->hd", last, last)

    def passed(self, layer: int) -> None:
        """The prompt has passed the layer."""
        self._sums[layer] = False

    def choose(self, layer: int, squares: F32) -> None:
        """Keep the channels that score highest, with the keys' ``squares``, summed, (n_kv_heads, head_dim)."""
        asked = self._asked[layer]
        scores = asked * squares if asked.any() else squares  # no queries are known where no prompt has been
        self.kept[layer] = top(scores, self.kept.shape[2])
        self._chosen[layer] = True

    def query(self, layer: int) -> Callable[[F32], F32]:
        """Makes queries, (n, n_heads × head_dim), those of the kept channels, (n, n_heads × n_kept)."""
        kept = self.kept[layer]

        def of_kept(q: F32) -> F32:
            each = q.reshape(len(q), len(kept), -1, self._asked.shape[2])
            out = np.empty((*each.shape[:3], kept.shape[1]), np.float32)
            for head, own in enumerate(kept):
                out[:, head] = each[:, head][..., own]
            return out.reshape(len(q), -1)

        return of_kept

    def clear(self) -> None:
        self._asked[...] = 0
        self._sums[:] = self._chosen[:] = False

    def counters(self) -> dict[str, list[int]]:
        return {"chosen": self._chosen.astype(int).tolist()}

    def restore(self, counters: Mapping[str, Any], needed: Sequence[bool]) -> None:
        """``needed``: of each layer, whether it has keys that lost channels.

        Raises
        ------
        CorruptFile : no channels are chosen there.
        """
        chosen = untrusted.counts(counters, "chosen", len(self._chosen), 1)
        if any(need and not has for need, has in zip(needed, chosen, strict=True)):
            raise CorruptFile("keys lost channels in a layer that has not chosen any")
        self._chosen[:] = chosen

    def held(self) -> dict[str, npt.NDArray[Any]]:
        """What is chosen, or what it is still to be chosen by."""
        found: dict[str, npt.NDArray[Any]] = {}
        for layer, chosen in enumerate(self._chosen):
            if chosen:
                found[f"{layer}.channels"] = self.kept[layer]
            else:
                found[f"{layer}.asked"] = self._asked[layer]
        return found

    def check(self) -> None:
        """
        Raises
        ------
        CorruptFile : channels that a head doesn't have, or has twice; sums of squares that are none.
        """
        for layer, chosen in enumerate(self._chosen):
            kept, asked = self.kept[layer].astype(np.int32), self._asked[layer]
            if chosen and ((kept >= asked.shape[1]).any() or (np.diff(kept, axis=1) <= 0).any()):
                raise CorruptFile(f"channels of layer {layer} are not different ones below {asked.shape[1]}, in order")
            if not chosen and not (np.isfinite(asked) & (asked >= 0)).all():
                raise CorruptFile(f"sums of squares of queries of layer {layer} are none")

    def copy(self, other: Channels) -> None:
        self.kept[...], self._asked[...] = other.kept, other._asked
        self._sums[:], self._chosen[:] = other._sums, other._chosen


def sum_of_squares(rows: F32) -> F32:
    """Of rows (…, n, d), for each channel: (…, d)."""
    return np.asarray(np.einsum("...nd,...nd->...d", rows, rows), np.float32)
