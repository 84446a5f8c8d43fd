"""Segments of a KV store against their reference, and the reference against one softmax over plain arrays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.ops import kvblocks, kvrows, segments

CHANNELS, TOKENS = segments.BY_CHANNEL, segments.BY_TOKEN


class Pass:
    """The state of a pass over segments, and what it comes to."""

    def __init__(self, q, n_heads, value_dim, implementation=ops):
        self.q, self.n_heads, self.impl = q, n_heads, implementation
        self.sums = np.zeros((len(q), n_heads, value_dim), np.float32)
        self.tops = np.full((len(q), n_heads), -np.inf, np.float32)
        self.totals = np.zeros((len(q), n_heads), np.float32)

    def take(self, segment, **options):
        key_dim, value_dim = self.q.shape[1] // self.n_heads, self.sums.shape[2]
        shape = (len(self.q), self.n_heads, len(segment_counts(segment)), max(key_dim, value_dim))
        scratch = np.full(ops.attention_scratch_bytes(*shape), 0xA5, np.uint8)
        self.impl.attend_segment(
            self.q, segment, self.sums, self.tops, self.totals, **{"scale": 0.3, "scratch": scratch} | options
        )
        return self

    @property
    def out(self):
        return self.sums / self.totals[..., None]


_COUNTS = {}


def segment_counts(segment):
    return _COUNTS[id(segment)][0]


def make(key_format, value_format, keys, values, counts, implementation=ops, *, group=32, slots=None, **extras):
    """A segment that holds (heads, n, dim) arrays in as many slots, or ``slots``; blocks of values end in NaN."""
    n_heads, n, key_dim = keys.shape
    room = slots or n
    if key_format in CHANNELS:
        room = -(-room // group) * group
        padded = np.zeros((n_heads, room, key_dim), np.float32)
        padded[:, :n] = keys
        key_bytes = kvblocks.encode(int(key_format[1]), padded.reshape(n_heads, -1, group, key_dim))
    else:
        key_bytes = np.zeros((n_heads, room, kvrows.row_bytes(key_format, key_dim)), np.uint8)
        key_bytes[:, :n] = kvrows.encode(key_format, keys)
    value_dim = values.shape[2]
    if value_format in TOKENS:
        padded = np.full((n_heads, -(-room // 32) * 32, value_dim), np.nan, np.float32)
        padded[:, :n] = values
        value_bytes = kvblocks.encode_values(int(value_format[1]), padded.reshape(n_heads, -1, 32, value_dim))
    elif value_format in CHANNELS:
        padded = np.zeros((n_heads, -(-n // group) * group, value_dim), np.float32)
        padded[:, :n] = values
        value_bytes = kvblocks.encode_channels(int(value_format[1]), padded.reshape(n_heads, -1, group, value_dim))
    else:
        value_bytes = np.zeros((n_heads, room, kvrows.row_bytes(value_format, value_dim)), np.uint8)
        value_bytes[:, :n] = kvrows.encode(value_format, values)
    counts = np.asarray(counts, np.int32)
    dims = {"key_dim": key_dim, "value_dim": value_dim, "counts": counts, "group": group}
    segment = implementation.Segment(key_format, key_bytes, value_format, value_bytes, **dims, **extras)
    _COUNTS[id(segment)] = (counts, segment)
    return segment


def arrays(rng, heads, n, key_dim, value_dim):
    return (rng.standard_normal((heads, n, dim)).astype(np.float32) for dim in (key_dim, value_dim))


def plain(q, pieces, n_heads, scale=0.3):
    """Attention of one token over the joined entries, in float64; pieces: (keys, values, n_kv_heads of entries)."""
    keys, values = (np.concatenate(each, axis=1).astype(np.float64) for each in zip(*pieces, strict=True))
    heads = q.reshape(len(q), len(keys), -1, keys.shape[2]).astype(np.float64)
    scores = np.einsum("tgrd,gnd->tgrn", heads, keys) * scale
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("tgrn,gnd->tgrd", weights, values).reshape(len(q), n_heads, -1)


def test_segments_are_one_softmax(rng):
    """The reference, on three segments of ragged counts, against everything written out."""
    q = rng.standard_normal((1, 6 * 8)).astype(np.float32)
    pieces = [tuple(arrays(rng, 2, n, 8, 12)) for n in (40, 1, 7)]
    state = Pass(q, 6, 12, segments)
    for keys, values in pieces:
        state.take(make("f32", "f32", keys, values, [keys.shape[1]] * 2, segments))
    assert np.allclose(state.out, plain(q, pieces, 6), atol=1e-6)


def test_counts_are_each_heads_own(rng):
    q = rng.standard_normal((1, 4 * 8)).astype(np.float32)
    keys, values = arrays(rng, 2, 20, 8, 8)
    out = Pass(q, 4, 8, segments).take(make("f32", "f32", keys, values, [3, 17], segments)).out
    for head, n in ((0, 3), (1, 17)):
        own = plain(q.reshape(2, 16)[head : head + 1], [(keys[head : head + 1, :n], values[head : head + 1, :n])], 2)
        assert np.allclose(out[:, 2 * head : 2 * head + 2], own, atol=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 5, 40])
@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [((9, 3), 64, 64), ((4, 1), 96, 64), ((5, 5), 40, 48)])
@pytest.mark.parametrize("key_format", ["f16", "q8", "q2", "bfp4", *CHANNELS])
def test_kernels_equal_the_reference(isa, key_format, heads, key_dim, value_dim, n_tokens, threads, rng):
    n_heads, n_kv_heads = heads
    for i, value_format in enumerate(("f16", "q4", "q3", "q2", "bfp4", *TOKENS, *CHANNELS)):
        threads(1 + i % 3)
        n = (32, 160, 416)[i % 3]
        keys, values = arrays(rng, n_kv_heads, n, key_dim, value_dim)
        counts = np.append(rng.integers(0, n + 1, n_kv_heads - 1), n)
        q = rng.standard_normal((n_tokens, n_heads * key_dim)).astype(np.float32)
        extra, group = arrays(rng, n_kv_heads, 9, key_dim, value_dim), (32, 64, 128)[i % 3]
        more = tuple(extra)
        states = []
        for implementation in (segments, ops):
            state = Pass(q, n_heads, value_dim, implementation)
            slots = None if key_format in CHANNELS else n + 11
            state.take(make(key_format, value_format, keys, values, counts, implementation, group=group, slots=slots))
            state.take(make("f16", "f16", *more, [9] * n_kv_heads, implementation), n_before=4)
            states.append(state)
        # One token's queries, and probabilities times the scales of values, may be rounded to 16 bits.
        bound = 3e-5 if n_tokens > 1 else 2e-3 if "3" in value_format or "2" in value_format else 1e-3
        assert np.abs(states[0].out - states[1].out).max() < bound, (value_format, n)
        assert np.allclose(states[0].tops, states[1].tops, atol=2e-3)


LEVELS = 32767  # to either side of zero, that terms are rounded to


@pytest.mark.parametrize("bits", kvblocks.BITS)
@pytest.mark.parametrize("heads", [(3, 1), (8, 8), (33, 1)])  # the last are too many for codes
def test_queries_times_scales_are_rounded_to_16_bits(isa, bits, heads, rng):
    """Each term by half a step of the largest of a block, and meets a code; with 8 bits it would be 258 times that.

    A few channels are large, as KIVI is for.
    """
    (n_heads, n_kv_heads), dim, n, group, top = heads, 64, 192, 64, 2**bits - 1
    sharing = n_heads // n_kv_heads
    keys, values = arrays(rng, n_kv_heads, n, dim, dim)
    keys[..., ::17] *= 20
    q = rng.standard_normal((1, n_heads * dim)).astype(np.float32)
    scores = np.empty((2, n_heads, 1, n), np.float32)
    for implementation, kept in zip((segments, ops), scores, strict=True):
        segment = make(f"c{bits}", "f32", keys, values, [n] * n_kv_heads, implementation, group=group)
        Pass(q, n_heads, dim, implementation).take(segment, scores=kept)
    blocks = kvblocks.encode(bits, keys.reshape(n_kv_heads, -1, group, dim))
    scales = blocks[..., : 2 * dim].copy().view(np.float16).astype(np.float64)
    terms = 0.3 * np.abs(q.reshape(n_kv_heads, sharing, 1, dim) * scales[:, None]).max(axis=-1)
    of_floats = dim * 2.0**-23 * np.abs(scores[0]).max()
    error = np.abs(scores[1] - scores[0]).reshape(n_kv_heads, sharing, -1, group).max(axis=-1)
    assert (error < dim * top * terms / LEVELS / 2 + of_floats).all()


@pytest.mark.parametrize("bits", kvblocks.BITS)
@pytest.mark.parametrize("heads", [(3, 1), (8, 8), (33, 1)])
def test_weights_times_scales_are_rounded_to_16_bits(isa, bits, heads, rng):
    """As above, of each tile of 64 entries; scores of float32 rows are within a few millionths of the reference."""
    (n_heads, n_kv_heads), dim, n = heads, 64, 192
    keys, values = arrays(rng, n_kv_heads, n, dim, dim)
    values[:, ::29] *= 5
    q = 0.1 * rng.standard_normal((1, n_heads * dim)).astype(np.float32)
    passes = []
    for implementation in (segments, ops):
        segment = make("f32", f"t{bits}", keys, values, [n] * n_kv_heads, implementation)
        passes.append(Pass(q, n_heads, dim, implementation).take(segment))
    # The largest weight is 1. A scale is its group's range over `top`, which is also the largest code.
    ranges = np.ptp(values.reshape(n_kv_heads, n, 2, 32), axis=-1).max()
    of_weights = n * ranges / LEVELS / 2 / passes[0].totals.min()
    assert np.abs(passes[1].out - passes[0].out).max() < of_weights + 1e-5 * np.abs(values).max()


@pytest.mark.parametrize("bits", kvblocks.BITS)
@pytest.mark.parametrize("heads", [(3, 1), (8, 8), (33, 1)])
def test_weights_of_values_by_channel_are_rounded_to_16_bits(isa, bits, heads, rng):
    """Whatever the scales of the channels are: the error is that of the weights, whose largest is 1, times the range of
    the channel."""
    (n_heads, n_kv_heads), dim, n, group = heads, 64, 192, 96
    keys, values = arrays(rng, n_kv_heads, n, dim, dim)
    values[..., ::17] *= 300
    q = 0.1 * rng.standard_normal((1, n_heads * dim)).astype(np.float32)
    passes = []
    for implementation in (segments, ops):
        segment = make("f32", f"c{bits}", keys, values, [n] * n_kv_heads, implementation, group=group)
        passes.append(Pass(q, n_heads, dim, implementation).take(segment))
    ranges = np.ptp(values, axis=1).max(axis=0)
    of_weights = n * ranges / LEVELS / 2 / passes[0].totals.min()
    errors = np.abs(passes[1].out - passes[0].out).max(axis=(0, 1))
    assert (errors < of_weights + 1e-5 * np.abs(values).max(axis=(0, 1))).all()


def test_entries_ahead_of_a_token_are_not_seen(isa, rng):
    keys, values = arrays(rng, 2, 50, 32, 32)
    q = rng.standard_normal((12, 4 * 32)).astype(np.float32)
    whole = Pass(q, 4, 32).take(make("f32", "f32", keys, values, [50, 50]), n_before=30).out
    for token in (0, 5, 11):
        n = 31 + token
        alone = Pass(q[token : token + 1], 4, 32).take(
            make("f32", "f32", keys[:, :n].copy(), values[:, :n].copy(), [n, n])
        )
        assert np.allclose(whole[token], alone.out[0], atol=2e-6)


def test_a_ring_starts_anywhere(isa, rng):
    keys, values = arrays(rng, 1, 20, 32, 32)
    q = rng.standard_normal((1, 32)).astype(np.float32)
    plain_order = Pass(q, 1, 32).take(make("f32", "f32", keys, values, [20])).out
    turned = make("f32", "f32", np.roll(keys, 7, axis=1), np.roll(values, 3, axis=1), [20])
    turned.key_start, turned.value_start = 7, 3
    assert np.array_equal(Pass(q, 1, 32).take(turned).out, plain_order)


@pytest.mark.parametrize(("key_format", "group", "start"), [("c2", 32, 96), ("c3", 64, 32), ("c4", 128, 160)])
def test_keys_by_channel_start_at_any_run(isa, key_format, group, start, rng):
    keys, values = arrays(rng, 2, 384, 32, 32)
    n = 384 - start - 5
    for n_tokens in (1, 3):
        q = rng.standard_normal((n_tokens, 4 * 32)).astype(np.float32)
        outs = []
        for implementation in (ops, segments):
            segment = make(key_format, "f16", keys, values, [n, n], implementation, group=group)
            segment.key_start = segment.value_start = start
            outs.append(Pass(q, 4, 32, implementation).take(segment).out)
        whole = kvblocks.decode(
            int(key_format[1]), kvblocks.encode(int(key_format[1]), keys.reshape(2, -1, group, 32)), group, 32
        )
        there = whole.reshape(2, 384, 32)[:, start : start + n], values[:, start : start + n].astype(np.float16)
        assert np.allclose(outs[1], plain(q, [there], 4), atol=1e-6)
        assert np.abs(outs[0] - outs[1]).max() < (1e-3 if n_tokens == 1 else 3e-5)


@pytest.mark.parametrize("value_format", TOKENS)
def test_values_by_token_start_at_any_block(isa, value_format, rng):
    keys, values = arrays(rng, 2, 200, 32, 40)
    n = 200 - 64 - 3
    for n_tokens in (1, 3):
        q = rng.standard_normal((n_tokens, 4 * 32)).astype(np.float32)
        outs = []
        for implementation in (ops, segments):
            segment = make("f32", value_format, np.roll(keys, -64, axis=1), values, [n, 31], implementation)
            segment.value_start = 64
            outs.append(Pass(q, 4, 40, implementation).take(segment).out)
        bits, padded = int(value_format[1]), np.zeros((2, 224, 40), np.float32)
        padded[:, :200] = values
        stored = kvblocks.encode_values(bits, padded.reshape(2, 7, 32, 40))
        there = kvblocks.decode_values(bits, stored, 40).reshape(2, 224, 40)[:, 64 : 64 + n]
        first = plain(q, [(keys[:, 64 : 64 + n], there)], 4)[:, :2]
        assert np.allclose(outs[1][:, :2], first, atol=1e-6)
        assert np.abs(outs[0] - outs[1]).max() < (1e-3 if n_tokens == 1 else 3e-5)


@pytest.mark.parametrize(("value_format", "group", "start"), [("c2", 32, 96), ("c3", 64, 32), ("c4", 128, 160)])
@pytest.mark.parametrize("dim", [32, 40])
def test_values_by_channel_start_at_any_run(isa, value_format, group, start, dim, rng):
    """So that a tile of 64 positions is of two groups, and begins in the middle of one."""
    keys, values = arrays(rng, 2, 384, 32, dim)
    bits, n = int(value_format[1]), 384 - start - 5
    stored = kvblocks.encode_channels(bits, values.reshape(2, -1, group, dim))
    there = kvblocks.decode_channels(bits, stored, group, dim).reshape(2, 384, dim)[:, start : start + n]
    for n_tokens in (1, 3):
        q = rng.standard_normal((n_tokens, 4 * 32)).astype(np.float32)
        outs = []
        for implementation in (ops, segments):
            segment = make("f32", value_format, keys, values, [n, n], implementation, group=group)
            segment.key_start = segment.value_start = start
            outs.append(Pass(q, 4, dim, implementation).take(segment).out)
        assert np.allclose(outs[1], plain(q, [(keys[:, start : start + n], there)], 4), atol=1e-6)
        assert np.abs(outs[0] - outs[1]).max() < (1e-3 if n_tokens == 1 else 3e-5)


def test_bias_and_factors(isa, rng):
    """A bias of log m is m equal entries; factors multiply keys and values."""
    keys, values = arrays(rng, 2, 70, 32, 32)
    q = rng.standard_normal((3, 4 * 32)).astype(np.float32)
    times = rng.integers(1, 5, (2, 70))
    factors = rng.uniform(0.5, 2, (2, 2, 70)).astype(np.float32)
    extras = {"bias": np.log(times).astype(np.float32), "key_scale": factors[0], "value_scale": factors[1]}
    for rows in (q, q[:1]):
        out = Pass(rows, 4, 32).take(make("f32", "f32", keys, values, [70, 70], **extras)).out
        for head in range(2):
            spread = [
                np.repeat(each[head] * factors[i, head][:, None], times[head], axis=0)[None]
                for i, each in enumerate((keys, values))
            ]
            own = rows.reshape(len(rows), 2, 2, 32)[:, head].reshape(len(rows), -1)
            assert np.allclose(out[:, 2 * head : 2 * head + 2], plain(own, [spread], 2), atol=5e-6)


def test_an_excluded_entry_has_no_part(isa, rng):
    keys, values = arrays(rng, 1, 100, 32, 32)
    q = rng.standard_normal((1, 32)).astype(np.float32)
    out = np.zeros((1, 100), bool)
    out[0, :70] = True  # a whole tile, and the beginning of the next
    bias = np.where(out, np.float32(segments.EXCLUDED), np.float32(0))
    got = Pass(q, 1, 32).take(make("f32", "f32", keys, values, [100], bias=bias)).out
    kept = Pass(q, 1, 32).take(make("f32", "f32", keys[:, 70:].copy(), values[:, 70:].copy(), [30])).out
    assert np.allclose(got, kept, atol=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 23])
def test_mass_is_each_entrys_share_of_the_softmax(isa, n_tokens, threads, rng):
    pieces = [tuple(arrays(rng, 2, n, 32, 32)) for n in (300, 40)]
    q = rng.standard_normal((n_tokens, 6 * 32)).astype(np.float32)
    masses = []
    for n_threads in (1, 3):
        threads(n_threads)
        state, kept = Pass(q, 6, 32), []
        for (keys, values), n_before in zip(pieces, (-1, 10), strict=True):
            scores = np.empty((6, n_tokens, keys.shape[1]), np.float32)
            state.take(make("f16", "f16", keys, values, [keys.shape[1]] * 2), n_before=n_before, scores=scores)
            kept.append(scores)
        # Rows of other arrays: at some distance, and longer than what is there.
        mass = [np.zeros((2, scores.shape[2] + 7), np.float32)[:, :-3] for scores in kept]
        below = [np.zeros((2, scores.shape[2]), np.float32) for scores in kept]
        limits = np.full(n_tokens, 1 / 340, np.float32)
        for scores, each, count in zip(kept, mass, below, strict=True):
            counts = np.full(2, scores.shape[2], np.int32)
            ops.attention_mass(scores, state.tops, state.totals, counts, each)
            ops.attention_mass(scores, state.tops, state.totals, counts, count, thresholds=limits)
        assert all((m[:, scores.shape[2] :] == 0).all() for m, scores in zip(mass, kept, strict=True))
        mass = [m[:, : scores.shape[2]] for m, scores in zip(mass, kept, strict=True)]
        masses.append(np.concatenate(mass + below, axis=1))
    assert np.array_equal(*masses)
    shares = np.zeros((n_tokens, 6, 340))
    for t, h in itertools.product(range(n_tokens), range(6)):
        keys = np.concatenate([piece[0][h // 3].astype(np.float16) for piece in pieces]).astype(np.float64)
        scores = keys @ q[t, 32 * h : 32 * h + 32] * 0.3
        scores[300 + 11 + t :] = -np.inf
        shares[t, h] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    expected = shares.reshape(n_tokens, 2, 3, 340)
    assert np.allclose(masses[0][:, :340], expected.sum(axis=(0, 2)), atol=1e-5 * n_tokens)
    near = np.abs(expected.max(axis=2) * 340 - 1).min(axis=0) < 1e-4  # on the threshold, rounding decides
    strikes = (expected.max(axis=2) < 1 / 340).sum(axis=0)
    assert np.array_equal(masses[0][:, 340:][~near], strikes[~near])


@pytest.mark.parametrize("formats", [("f16", "q2"), ("q8", "q2"), ("c2", "t2"), ("c4", "t4")])
def test_results_do_not_depend_on_threads(isa, formats, threads, rng):
    keys, values = arrays(rng, 3, 1024, 64, 64)
    segment = make(*formats, keys, values, [1024] * 3)
    for n_tokens in (1, 30):
        q, seen = rng.standard_normal((n_tokens, 9 * 64)).astype(np.float32), set()
        for n in (1, 2, 3):
            threads(n)
            seen.add(Pass(q, 9, 64).take(segment).out.tobytes())
        assert len(seen) == 1


@pytest.mark.parametrize("key_format", ["f16", "q4", "c2", "c3", "c4", "c8"])
def test_nan_in_a_key_spoils_its_head_alone(isa, key_format, rng):
    keys, values = arrays(rng, 2, 64, 32, 32)
    keys[1, 40, 3] = np.nan
    for n_tokens in (1, 3):
        q = rng.standard_normal((n_tokens, 4 * 32)).astype(np.float32)
        out = Pass(q, 4, 32).take(make(key_format, "f16", keys, values, [64, 64])).out
        assert np.isfinite(out[:, :2]).all()
        assert np.isnan(out[:, 2:]).all()


@pytest.mark.parametrize("value_format", ["f16", "q2", *TOKENS])
def test_nan_in_a_value_spoils_its_channels_alone(isa, value_format, rng):
    keys, values = arrays(rng, 2, 64, 32, 64)
    values[1, 40, 3] = np.nan
    width = 1 if value_format == "f16" else 32
    for n_tokens in (1, 3):
        q = rng.standard_normal((n_tokens, 4 * 32)).astype(np.float32)
        segment = make("f16", value_format, keys, values, [64, 64])
        out = Pass(q, 4, 64).take(segment).out
        spoilt = np.zeros((4, 64), bool)
        spoilt[2:, 3 // width * width : 3 // width * width + width] = True
        assert np.array_equal(np.isnan(out), np.broadcast_to(spoilt, out.shape))
        segment_counts(segment)[:] = 40  # what comes behind is not looked at
        assert np.isfinite(Pass(q, 4, 64).take(segment).out).all()


@pytest.mark.parametrize("fmt", kvrows.FORMATS)
def test_rows_go_to_the_slots_of_each_head(isa, fmt, rng):
    rows = rng.standard_normal((3, 2 * 40)).astype(np.float32)
    slots = np.array([[4, 0, 2], [1, 5, 3]], np.int32)
    buffer = np.zeros((2, 6, kvrows.row_bytes(fmt, 40)), np.uint8)
    ops.kv_write(rows, buffer, fmt, slots)
    encoded = kvrows.encode(fmt, rows.reshape(3, 2, 40))
    for head, token in itertools.product(range(2), range(3)):
        assert np.array_equal(buffer[head, slots[head, token]], encoded[token, head])
    assert not buffer[0, [1, 3, 5]].any()
    assert not buffer[1, [0, 2, 4]].any()
    with pytest.raises(ValueError, match="slots must be 0 to 5, got 6"):
        ops.kv_write(rows, buffer, fmt, slots + 1)


@pytest.mark.parametrize("bits", kvblocks.BITS)
@pytest.mark.parametrize(("group", "head_dim"), [(32, 64), (64, 40), (128, 8), (32, 256)])
def test_blocks_round_each_channel_to_half_a_step(bits, group, head_dim, rng):
    keys = rng.standard_normal((3, 2, group, head_dim)).astype(np.float32) * rng.uniform(0.1, 10, head_dim)
    keys = keys.astype(np.float32)
    packed = kvblocks.encode(bits, keys)
    assert packed.shape == (3, 2, kvblocks.block_bytes(bits, group, head_dim))
    back = kvblocks.decode(bits, packed, group, head_dim)
    step = np.ptp(keys, axis=-2, keepdims=True) / (2**bits - 1)
    rounding = np.abs(keys).max(axis=-2, keepdims=True) * 2.0**-10 * 2**bits  # of scales and minimums to f16
    assert (np.abs(back - keys) <= step / 2 + rounding).all()
    assert np.abs(back - keys).max() > 0


@pytest.mark.parametrize("head_dim", [8, 32, 64, 40, 96])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_blocks_of_values_hold_what_rows_do(bits, head_dim, rng):
    """By another layout, in the same bytes: the numbers are the same."""
    values = rng.standard_normal((3, 2, 32, head_dim)).astype(np.float32) * rng.uniform(0.1, 10, (32, 1))
    values = values.astype(np.float32)
    values[0, 0, 5, 1], values[1, 1, 7] = np.nan, 0
    packed = kvblocks.encode_values(bits, values)
    rows = kvrows.encode(f"q{bits}", values)
    assert packed.shape == (3, 2, kvblocks.value_block_bytes(bits, head_dim))
    assert packed.size == rows.size
    back = kvblocks.decode_values(bits, packed, head_dim)
    assert np.array_equal(back, kvrows.decode(f"q{bits}", rows, head_dim), equal_nan=True)


@pytest.mark.parametrize("bits", kvblocks.BITS)
@pytest.mark.parametrize(("group", "head_dim"), [(32, 64), (64, 40), (128, 8), (32, 256)])
def test_values_by_channel_are_what_keys_are(bits, group, head_dim, rng):
    """By another layout, in the same bytes but for the pads of keys: the numbers are the same."""
    values = rng.standard_normal((3, 2, group, head_dim)).astype(np.float32) * rng.uniform(0.1, 10, head_dim)
    values = values.astype(np.float32)
    values[1, 0, 7, 3] = np.inf
    packed = kvblocks.encode_channels(bits, values)
    assert packed.shape == (3, 2, kvblocks.channel_block_bytes(bits, group, head_dim))
    back = kvblocks.decode_channels(bits, packed, group, head_dim)
    assert np.isnan(back[1, 0, :, 3]).all()
    as_keys = kvblocks.decode(bits, kvblocks.encode(bits, values), group, head_dim)
    assert np.array_equal(back, as_keys, equal_nan=True)


def test_words_of_values_by_channel():
    """Scales, minimums, and 32 positions after the other words as of values by token; written out by hand."""
    values = np.full((64, 33), -1, np.float32)
    values[0] += 3  # each channel's range is -1 to 2
    values[32 + 18, 5] += 2
    values[32 + 9, 32] += 1
    packed = kvblocks.encode_channels(2, values)
    assert packed[:66].view(np.float16).tolist() == [1] * 33
    assert packed[66:132].view(np.float16).tolist() == [-1] * 33
    first, second = packed[132:].view("<u4").reshape(2, 66)  # of 32 positions: two words of 32 channels, then of one
    assert (first[:32] == 3).all()
    assert first[64] == 3
    assert second[5] == 2 << (16 + 2 * 2)
    assert second[65] == 1 << (2 * 1)
    assert not np.delete(first, [*range(32), 64]).any()
    assert not np.delete(second, [5, 65]).any()


def test_words_of_codes():
    """Lane j of a run has word j of each chunk, and terms c and 16 + c its two halves; written out by hand."""
    values = np.zeros((32, 33), np.float32)
    values[:, 0] = 3  # each position's range is 0 to 3, so codes are what is written here
    values[18, 5] = 2
    values[9, 5] = 1
    packed = kvblocks.encode_values(2, values)
    words = packed[128 : 128 + 256].view("<u4").reshape(2, 32)  # of the first 32 channels: chunks, channels
    assert packed[:64].view(np.float16).tolist() == [1] * 32  # scales
    assert (words[:, 0] == 0xFFFFFFFF).all()
    assert words[0, 5] == 2 << (16 + 2 * 2)  # position 18 is the third of the upper half
    assert words[1, 5] == 1 << (2 * 1)  # position 9, the second of the second chunk
    assert not np.delete(words, (0, 5), axis=1).any()
    assert packed.size == 128 + 256 + 128 + 8  # the last channel: two chunks of one word


def test_bytes_of_blocks():
    """KIVI's count: codes, and 4 bytes for each group of a channel."""
    assert kvblocks.block_bytes(2, 32, 64) == 32 * 64 * 2 // 8 + 4 * 64
    assert kvblocks.block_bytes(3, 64, 64) == 64 * 64 * 3 // 8 + 4 * 64
    assert kvblocks.block_bytes(2, 32, 40) == 32 * 48 * 2 // 8 + 4 * 40  # codes of 40 channels take room for 48
    assert kvblocks.value_block_bytes(2, 64) == 32 * 64 * 2 // 8 + 2 * 128
    assert kvblocks.value_block_bytes(3, 40) == 32 * 40 * 3 // 8 + 2 * 128
    assert kvblocks.channel_block_bytes(4, 128, 64) == 128 * 64 * 4 // 8 + 4 * 64
    assert kvblocks.channel_block_bytes(3, 64, 40) == 64 * 40 * 3 // 8 + 4 * 40
    for n_bytes in (kvblocks.block_bytes, kvblocks.channel_block_bytes):
        with pytest.raises(InvalidInput, match="2, 3, 4, 8 bits, got 5"):
            n_bytes(5, 32, 64)
        with pytest.raises(InvalidInput, match="multiple of 32, got 48"):
            n_bytes(2, 48, 64)


def test_wrong_arguments_are_refused(rng):
    keys, values = arrays(rng, 2, 40, 32, 32)
    segment = make("f16", "f16", keys, values, [40, 40])
    state = Pass(np.zeros((1, 4 * 32), np.float32), 4, 32)
    counts = segment_counts(segment)
    counts[1] = 41
    with pytest.raises(ValueError, match="a segment of 40 entries has a count of 41"):
        state.take(segment)
    counts[1] = 40
    for options, message in (
        ({"scratch": np.empty(8, np.uint8)}, "bytes of scratch"),
        ({"scores": np.empty((4, 1, 39), np.float32)}, "entries of scores: expected 40, got 39"),
        ({"n_before": -2}, "n_before must be -1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            state.take(segment, **options)
    with pytest.raises(ValueError, match="bytes of a KV row"):
        ops.Segment(
            "f16", np.zeros((2, 4, 64), np.uint8), "f16", np.zeros((2, 4, 60), np.uint8),
            key_dim=32, value_dim=32, counts=np.zeros(2, np.int32),
        )  # fmt: skip
