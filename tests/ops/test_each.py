"""One token of each of several sequences: the same as each sequence alone, and as the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from barefoot import ops
from barefoot.ops import kvrows, reference


@dataclass(frozen=True)
class Case:
    """``positions[i]`` is the present token's of sequence ``sequences[i]``, of ``n_sequences`` in the store."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    capacity: int
    sequences: Sequence[int]
    positions: Sequence[int]
    n_sequences: int
    window: int = 0
    softcap: float = 0.0

    @property
    def shape(self) -> dict[str, int]:
        return {k: getattr(self, k) for k in ("n_heads", "n_kv_heads", "head_dim", "capacity")}


CASES = (
    Case(9, 3, 64, 40, [0], [7], 1),
    Case(9, 3, 64, 700, [2, 0, 3], [650, 3, 299], 4),  # one, two and three ranges of keys
    Case(4, 1, 256, 30, [1, 0], [200, 4], 2, window=20, softcap=3.0),  # a ring that has wrapped beside one that hasn't
    Case(8, 8, 80, 64, list(range(16)), list(range(0, 64, 4)), 16),
    Case(4, 2, 34, 20, [1, 2, 0], [19, 0, 5], 3),
    Case(34, 1, 16, 20, [0, 1], [3, 19], 2),
)
ALL = [(case, fmt) for case in CASES for fmt in kvrows.FORMATS if case.head_dim % kvrows.whole(fmt) == 0]
COARSER = {"q3": 15 / 7, "q2": 5}  # steps than those of q4


def filled(case, fmt, rng):
    """Keys and values of all sequences, [n_sequences, n_kv_heads, capacity, row_bytes], any past positions."""
    rows = rng.standard_normal((2, case.n_sequences, case.n_kv_heads, case.capacity, case.head_dim)).astype(np.float32)
    return kvrows.encode(fmt, rows)


def attend(case, fmt, q, keys, values, implementation=ops):
    out = np.full_like(q, 7)
    heads = (case.n_heads, case.n_kv_heads, case.head_dim)
    scratch = np.empty(ops.attention_scratch_bytes(len(q), *heads, each=True), np.uint8)
    options = {"window": case.window, "softcap": case.softcap, "scale": case.head_dim**-0.5, "scratch": scratch}
    implementation.attention_each(
        q, keys, values, fmt, out, **case.shape, sequences=case.sequences, positions=case.positions, **options
    )
    return out


def attend_alone(case, fmt, q, keys, values):
    out = np.full_like(q, 7)
    scratch = np.empty(ops.attention_scratch_bytes(1, case.n_heads, case.n_kv_heads, case.head_dim), np.uint8)
    options = {"window": case.window, "softcap": case.softcap, "scale": case.head_dim**-0.5, "scratch": scratch}
    for i, (s, position) in enumerate(zip(case.sequences, case.positions, strict=True)):
        row = slice(i, i + 1)
        ops.attention(
            q[row], keys[s], values[s], fmt, out[row], **case.shape, n_past=position, n_tokens=1, **options
        )  # fmt: skip
    return out


@pytest.mark.parametrize(("case", "fmt"), ALL)
def test_attention_is_what_each_sequence_gives_alone(isa, case, fmt, threads, rng):
    keys, values = filled(case, fmt, rng)
    q = rng.standard_normal((len(case.sequences), case.n_heads * case.head_dim)).astype(np.float32)
    for n in (1, 3):
        threads(n)
        got = attend(case, fmt, q, keys, values)
        assert np.array_equal(got, attend_alone(case, fmt, q, keys, values))
    # Codes are multiplied as integers, see test_attention.py; floats differ in the order of sums only.
    bound = 5e-4 * COARSER.get(fmt, 1) if fmt in kvrows.INTEGERS and case.head_dim % 32 == 0 else 3e-6
    assert np.abs(got - attend(case, fmt, q, keys, values, reference)).max() < bound


@pytest.mark.parametrize(("case", "fmt"), ALL)
def test_kv_append_touches_one_slot_of_each_sequence(isa, case, fmt, rng):
    stores = [
        np.zeros((2, case.n_sequences, case.n_kv_heads, case.capacity, kvrows.row_bytes(fmt, case.head_dim)), np.uint8)
        for _ in range(2)
    ]
    k, v = rng.standard_normal((2, len(case.sequences), case.n_kv_heads * case.head_dim)).astype(np.float32)
    for store, implementation in zip(stores, (ops, reference), strict=True):
        implementation.kv_append_each(
            k, v, store[0], store[1], fmt, case.capacity, list(case.sequences), list(case.positions)
        )
    assert np.array_equal(*stores)
    written = {tuple(at) for at in np.argwhere(stores[0][0].any(axis=(1, 3)))}
    assert written == {(s, p % case.capacity) for s, p in zip(case.sequences, case.positions, strict=True)}


def test_a_sequence_of_nan_leaves_the_others_alone(isa, rng):
    case = CASES[1]
    keys, values = filled(case, "f16", rng)
    q = rng.standard_normal((3, 9 * 64)).astype(np.float32)
    good = attend(case, "f16", q, keys, values)
    keys.view(np.float16)[0] = np.nan
    values.view(np.float16)[3] = np.inf
    got = attend(case, "f16", q, keys, values)
    assert np.isnan(got[1]).all()
    assert np.isinf(got[2]).all()
    assert np.array_equal(got[0], good[0])


@pytest.mark.parametrize("fmt", ["f16", "q4"])
@pytest.mark.parametrize("case", [CASES[1], CASES[3]])
def test_the_stated_scratch_is_exactly_what_is_used(isa, case, fmt, threads, rng):
    threads(2)
    keys, values = filled(case, fmt, rng)
    n, heads = len(case.sequences), (case.n_heads, case.n_kv_heads, case.head_dim)
    q = rng.standard_normal((n, case.n_heads * case.head_dim)).astype(np.float32)
    size = ops.attention_scratch_bytes(n, *heads, n_threads=2, each=True)
    guarded = np.full(size + 64, 0xA5, np.uint8)
    arguments = {"sequences": case.sequences, "positions": case.positions, "scale": 0.1, **case.shape}
    ops.attention_each(q, keys, values, fmt, np.empty_like(q), **arguments, scratch=guarded[:size])
    assert (guarded[size:] == 0xA5).all()
    with pytest.raises(ValueError, match=f"scratch: expected {size}, got {size - 1}"):
        ops.attention_each(q, keys, values, fmt, np.empty_like(q), **arguments, scratch=guarded[: size - 1])


def test_wrong_arguments_are_refused(rng):
    case = CASES[1]
    keys, values = filled(case, "f16", rng)
    q = rng.standard_normal((3, 9 * 64)).astype(np.float32)
    k = rng.standard_normal((3, 3 * 64)).astype(np.float32)
    good = {"sequences": [2, 0, 3], "positions": [5, 5, 5]}
    options = {**case.shape, "scale": 1.0, "scratch": np.empty(1 << 20, np.uint8)}
    for match, changed in (
        ("sequence 2 is there twice", {"sequences": [2, 0, 2]}),
        ("below the number of sequences: expected 4, got 4", {"sequences": [2, 0, 4]}),
        ("below the number of sequences: expected 4, got -1", {"sequences": [2, 0, -1]}),
        ("number of positions: expected 3, got 2", {"positions": [1, 2]}),
        ("tokens: expected 2, got 3", {"sequences": [1, 2], "positions": [1, 2]}),
    ):
        with pytest.raises(ValueError, match=match):
            ops.attention_each(q, keys, values, "f16", np.empty_like(q), **options, **(good | changed))
        with pytest.raises(ValueError, match=match):
            ops.kv_append_each(k, k, keys, values, "f16", 700, **(good | changed))
    with pytest.raises(ValueError, match="at most the capacity: expected 700, got 701"):
        ops.attention_each(
            q, keys, values, "f16", np.empty_like(q), **options, sequences=[2, 0, 3], positions=[5, 700, 5]
        )
    with pytest.raises(ValueError, match="start: expected 0, got -1"):
        ops.kv_append_each(k, k, keys, values, "f16", 700, [2, 0, 3], [5, -1, 5])
