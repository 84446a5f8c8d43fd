"""The entries of one layer as tensors of stored rows, which hold what is there and nothing else.

Every part is (batch, n_kv_heads, …), and what each entry has is (batch, n_kv_heads, n, …): its key and its value in
rows, uint8, its position, int32, and what its policy observes of it, float32. Entries are in order of their positions;
sequences of a batch, and key heads, have the same number of them, and each its own. One that goes leaves the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from barefoot.kv.storage import F32, I32, STAGED
from barefoot.kv.stores import KVStore, SealingStore
from barefoot.ops import kvblocks, kvrows

_FLOATS = {"f32": torch.float32, "f16": torch.float16}
_WIDE = (torch.int64, torch.int32, torch.int16)  # rows are moved in elements as wide as their bytes allow


def encode(fmt: str, x: Tensor) -> Tensor:
    """Floats (..., dim) to rows of their own, uint8 (..., row_bytes)."""
    x = x.detach()
    if fmt in _FLOATS:
        return x.to(_FLOATS[fmt]).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    rows = kvrows.encode(fmt, x.float().cpu().contiguous().numpy())
    return torch.from_numpy(rows).to(x.device)


def decode(fmt: str, rows: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows to floats (..., dim)."""
    if fmt in _FLOATS:
        return rows.view(_FLOATS[fmt]).to(dtype)
    return torch.from_numpy(kvrows.decode(fmt, rows.cpu().numpy(), dim)).to(rows.device, dtype)


def taken(part: Tensor, slots: Tensor) -> Tensor:
    """Of a part (batch, n_kv_heads, n, …) the entries at ``slots``, int64 (batch, n_kv_heads, kept)."""
    batch, head = (torch.arange(n, device=part.device) for n in slots.shape[:2])
    at = batch[:, None, None], head[:, None], slots
    for wide in _WIDE if part.dtype == torch.uint8 else ():
        if part.shape[-1] % wide.itemsize == 0 and part.shape[-1] > wide.itemsize:  # one alone has any stride
            return part.view(wide)[at].view(torch.uint8)
    return part[at]


class Entries:
    """Keys and values in rows of one format. Bytes of an entry: 2 rows, 4 for its position, 4 for each number observed.

    k, v : (batch, n_kv_heads, any, dim), of which the shapes count. observed : further axes of what is observed of each
    entry, by name. ``parts`` : all tensors, by name.
    """

    lets_go = True  # whether entries that have been stored can go

    def __init__(self, k: Tensor, v: Tensor, fmt: str, observed: Mapping[str, tuple[int, ...]]) -> None:
        self._each, self._device = tuple(k.shape[:2]), k.device
        self._format, self._dims = fmt, (k.shape[-1], v.shape[-1])
        self._observed = tuple(observed)
        self.parts: dict[str, Tensor] = {"position": self._none(dtype=torch.int32)}
        for name, dim in zip(("keys", "values"), self._dims, strict=True):
            self.parts[name] = self._none(kvrows.row_bytes(fmt, dim))
        for name, axes in observed.items():
            self.parts[name] = self._none(*axes, dtype=torch.float32)

    def _none(self, *axes: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty((*self._each, 0, *axes), dtype=dtype, device=self._device)

    def _grow(self, **more: Tensor) -> None:
        for name, part in more.items():
            self.parts[name] = torch.cat([self.parts[name], part], dim=2)

    @property
    def position(self) -> Tensor:
        """int32 (batch, n_kv_heads, n)."""
        return self.parts["position"]

    @property
    def n(self) -> int:
        return self.position.shape[2]

    def append(self, k: Tensor, v: Tensor, first: int, *, store: bool = True) -> None:
        """Entries k, v (batch, n_kv_heads, m, dim) at positions ``first`` on; nothing is observed of them yet. Without
        ``store`` their rows wait for :meth:`store`."""
        m = k.shape[2]
        position = torch.arange(first, first + m, dtype=torch.int32, device=k.device)
        self._grow(position=position.expand(*self._each, m))
        if store:
            self.store(k, v)
        for name in self._observed:
            axes = self.parts[name].shape[3:]
            self._grow(**{name: self.parts[name].new_zeros((*self._each, m, *axes))})

    def store(self, k: Tensor, v: Tensor) -> None:
        """Rows of the last entries."""
        self._grow(keys=encode(self._format, k), values=encode(self._format, v))

    def keep(self, slots: Tensor) -> None:
        """Only the entries at ``slots``, ascending, int64 (batch, n_kv_heads, kept), stay."""
        for name in ("position", "keys", "values", *self._observed):
            self.parts[name] = taken(self.parts[name], slots)

    def pick(self, sequences: Tensor) -> None:
        """Other sequences of the batch take the places of these."""
        self.parts = {name: part.index_select(0, sequences.to(part.device)) for name, part in self.parts.items()}
        self._each = (len(sequences), self._each[1])

    def seal(self) -> None:
        """Attention has seen the last entries: what of them is stored in another way from then on is."""

    def floats(self, name: str, sequence: int, head: int) -> F32:
        """The ``keys`` or ``values`` of one head, float32 (n, dim), decoded anew each time."""
        dim = self._dims[("keys", "values").index(name)]
        rows = self.parts[name][sequence, head].clone()  # which floats may be, and callers write into them
        found: F32 = decode(self._format, rows, dim, torch.float32).cpu().numpy()
        return found

    def rewrite(self, sequence: int, head: int, entries: I32, keys: F32, values: F32) -> None:
        """Let some entries of a head have these keys and values."""
        for name, rows in (("keys", keys), ("values", values)):
            part = self.parts[name] = self.parts[name].clone()
            part[sequence, head, entries.astype(np.int64)] = encode(self._format, torch.from_numpy(rows)).to(
                part.device
            )

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All keys and all values, (batch, n_kv_heads, n, dim)."""
        k, v = self._dims
        keys = decode(self._format, self.parts["keys"], k, dtype)
        return keys, decode(self._format, self.parts["values"], v, dtype)


class Sealed(Entries):
    """Old keys and values in blocks, as :mod:`barefoot.kv.sealed` has them, without its room for more.

    The others wait in rows of half precision.
    """

    lets_go = False

    def __init__(self, k: Tensor, v: Tensor, store: SealingStore) -> None:
        super().__init__(k, v, STAGED, {})
        self._store = store
        self.parts["blocks"] = self._none(store.block_bytes(k.shape[-1]))
        self.parts["sealed"] = self._none(store.value_block_bytes(v.shape[-1]))

    def keep(self, slots: Tensor) -> None:
        assert self.parts["keys"].shape[2] == self.parts["values"].shape[2] == self.n  # nothing is sealed yet
        super().keep(slots)

    def seal(self) -> None:
        store, waiting, (k, v) = self._store, self.parts["keys"], self._dims
        if n := waiting.shape[2] // store.residual * store.residual:
            keys = decode(STAGED, waiting[:, :, :n].contiguous(), k, torch.float32)
            blocks = kvblocks.encode(store.bits, keys.view(*self._each, -1, store.group, k).cpu().numpy())
            self._grow(blocks=torch.from_numpy(blocks).to(waiting.device))
            self.parts["keys"] = waiting[:, :, n:].clone()
        waiting = self.parts["values"]
        each = store.n_values_sealed
        if n := max(0, waiting.shape[2] - store.n_values_left) // each * each:
            values = decode(STAGED, waiting[:, :, :n].contiguous(), v, torch.float32)
            blocks = store.encode_values(values.view(*self._each, -1, each, v).cpu().numpy())
            self._grow(sealed=torch.from_numpy(blocks).to(waiting.device))
            self.parts["values"] = waiting[:, :, n:].clone()

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        store, (k, v) = self._store, self._dims
        blocks, sealed = self.parts["blocks"], self.parts["sealed"]
        keys, values = super().dense(dtype)
        if blocks.shape[2]:
            rows = kvblocks.decode(store.bits, blocks.cpu().numpy(), store.group, k).reshape(*self._each, -1, k)
            keys = torch.cat([torch.from_numpy(rows).to(keys.device, dtype), keys], dim=2)
        if sealed.shape[2]:
            rows = store.decode_values(sealed.cpu().numpy(), v).reshape(*self._each, -1, v)
            values = torch.cat([torch.from_numpy(rows).to(values.device, dtype), values], dim=2)
        return keys, values


class StoredRows:
    """Rows of one sequence of a batch, as :mod:`barefoot.kv.merging` reads and writes them."""

    def __init__(self, entries: Entries, sequence: int) -> None:
        self._entries, self._sequence = entries, sequence

    def keys(self, head: int) -> F32:
        return self._entries.floats("keys", self._sequence, head)

    def values(self, head: int, entries: I32) -> F32:
        return self._entries.floats("values", self._sequence, head)[entries]

    def rewrite(self, head: int, entries: I32, keys: F32, values: F32) -> None:
        self._entries.rewrite(self._sequence, head, entries, keys, values)


class PromptRows:
    """Those, and behind them a prompt's keys and values, float32 (batch, n_kv_heads, m, dim), which are written too."""

    def __init__(self, entries: Entries, sequence: int, k: Tensor, v: Tensor) -> None:
        self._stored, self._n = StoredRows(entries, sequence), entries.n
        self._k, self._v = k[sequence], v[sequence]

    def keys(self, head: int) -> F32:
        new = self._k[head].detach().float().cpu().numpy()
        return np.concatenate([self._stored.keys(head), new]) if self._n else new.copy()

    def values(self, head: int, entries: I32) -> F32:
        new = self._v[head].detach().float().cpu().numpy()
        old = self._stored.values(head, np.arange(self._n, dtype=np.int32))
        return np.asarray(np.concatenate([old, new])[entries])

    def rewrite(self, head: int, entries: I32, keys: F32, values: F32) -> None:
        old = entries < self._n
        if old.any():
            self._stored.rewrite(head, entries[old], keys[old], values[old])
        at = torch.from_numpy(entries[~old].astype(np.int64) - self._n).to(self._k.device)
        for rows, into in ((keys, self._k), (values, self._v)):
            into[head, at] = torch.from_numpy(rows[~old]).to(into)


def entries_of(store: KVStore, k: Tensor, v: Tensor, observed: Mapping[str, tuple[int, ...]]) -> Entries:
    """None yet, of keys and values like these."""
    if isinstance(store, SealingStore):
        assert not observed  # policies that watch what is decoded send it away singly, which sealed entries can't
        return Sealed(k, v, store)
    return Entries(k, v, store.row_format, observed)
