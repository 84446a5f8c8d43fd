"""Recorded ops: the same numbers as calling them one by one, for any number of tokens."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from barefoot import ops
from barefoot.ops import cases, reference

D, HEADS, KV_HEADS, HEAD_DIM, FF, CAPACITY, MOST, SEQUENCES = 64, 4, 2, 16, 96, 40, 7, 3


def build(module, rng):
    """A whole layer on ``module``'s program, and the arrays that it leaves its results in."""

    def floats(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def weight(name, rows, cols, layout="rows"):
        raw = cases.random_packed(name, rows, cols, rng)
        packed = np.zeros(raw.size, np.uint8)
        if layout == "panels":
            ops.pack_panels(name, raw, rows, cols, packed)
        else:
            packed[:] = raw.reshape(-1)
        return module.PackedWeight(name, rows, cols, packed, layout=layout)

    q_width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    x, normed, joined = floats(MOST, D), floats(MOST, D), floats(MOST, q_width)
    q, k, v = floats(MOST, q_width), floats(MOST, kv_width), floats(MOST, kv_width)
    gate, up, down = floats(MOST, FF), floats(MOST, FF), floats(MOST, D)
    cos, sin = floats(MOST, HEAD_DIM // 2), floats(MOST, HEAD_DIM // 2)
    keys, values = (np.zeros((SEQUENCES, KV_HEADS, CAPACITY, 2 * HEAD_DIM), np.uint8) for _ in range(2))
    need = max(ops.matmul_scratch_bytes(MOST, FF), ops.attention_scratch_bytes(MOST, HEADS, KV_HEADS, HEAD_DIM))
    need = max(need, ops.attention_scratch_bytes(SEQUENCES, HEADS, KV_HEADS, HEAD_DIM, each=True))
    scratch = np.zeros(need, np.uint8)
    program = module.Program()
    program.rmsnorm(x, floats(D), 1e-5, normed)
    qkv = [weight("q4_1", q_width, D, "panels"), weight("q8_0", kv_width, D), weight("f16", kv_width, D)]
    program.matmul(normed, qkv, [q, k, v], scratch=scratch)
    program.add_(q, floats(q_width))
    program.head_rmsnorm(q, HEADS, HEAD_DIM, floats(HEAD_DIM), 1e-5, plus_one=True)
    program.rope(q, HEADS, HEAD_DIM, cos, sin, interleaved=False)
    program.rope(k, KV_HEADS, HEAD_DIM, cos, sin, interleaved=True)
    program.kv_append(k, v, keys, values, "f16", CAPACITY)
    program.attention(
        q, keys, values, "f16", joined, n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=HEAD_DIM, capacity=CAPACITY,
        scale=0.25, window=9, scratch=scratch,
    )  # fmt: skip
    program.matmul(joined, [weight("q4_0", D, q_width, "panels")], [x], add=True, scratch=scratch)
    program.rmsnorm(x, floats(D), 1e-5, normed)
    program.matmul(normed, [weight("q5_0", FF, D, "panels"), weight("q5_0", FF, D)], [gate, up], scratch=scratch)
    program.glu(gate, up, gate)
    program.matmul(gate, [weight("int8_g32_sym", D, FF)], [down], activations="float32", scratch=scratch)
    program.add_(x, down)
    return program, x, keys, values


def test_a_layer_equals_the_reference(isa):
    program, x, keys, values = build(ops, np.random.default_rng(5))
    expected, x_expected, keys_expected, values_expected = build(reference, np.random.default_rng(5))
    past = 0
    for n in (5, 1, 1, 7, 1):
        x[:] = x_expected[:] = np.random.default_rng(n).standard_normal(x.shape)
        program.run(n, past)
        expected.run(n, past)
        scale = np.abs(x_expected[:n]).max()
        assert np.abs(x[:n] - x_expected[:n]).max() < 2e-2 * scale  # int8 rounds to the other side now and then
        assert np.array_equal(x[n:], x_expected[n:])  # rows beyond n are not touched
        past += n
    for stored, wanted in ((keys, keys_expected), (values, values_expected)):
        halves, halves_expected = stored.view(np.float16), wanted.view(np.float16)
        assert np.abs(halves[:, :past].astype(float) - halves_expected[:, :past]).max() < 0.1
        assert not stored[:, past:].any()


def test_one_token_of_each_sequence_equals_the_reference(isa):
    program, x, keys, values = build(ops, np.random.default_rng(5))
    expected, x_expected, keys_expected, _ = build(reference, np.random.default_rng(5))
    lengths = dict.fromkeys(range(SEQUENCES), 0)
    for sequence, n in ((2, 5), (0, 1)):
        program.run(n, 0, sequence)
        expected.run(n, 0, sequence)
        lengths[sequence] = n
    for sequences in ([0, 2], [2, 1, 0], [1]):
        positions = [lengths[s] for s in sequences]
        x[:] = x_expected[:] = np.random.default_rng(len(sequences)).standard_normal(x.shape)
        program.run_each(sequences, positions)
        expected.run_each(sequences, positions)
        n = len(sequences)
        assert np.abs(x[:n] - x_expected[:n]).max() < 2e-2 * np.abs(x_expected[:n]).max()
        assert np.array_equal(x[n:], x_expected[n:])
        for s in sequences:
            lengths[s] += 1
    for s, length in lengths.items():
        halves, halves_expected = keys[s].view(np.float16), keys_expected[s].view(np.float16)
        assert np.abs(halves[:, :length].astype(float) - halves_expected[:, :length]).max() < 0.1
        assert not keys[s, :, length:].any()
        assert not values[s, :, length:].any()
    with pytest.raises(ValueError, match="sequence 1 is there twice"):
        program.run_each([1, 1], [3, 3])


def test_a_program_equals_single_calls(isa, rng):
    x, y = rng.standard_normal((2, 3, 64)).astype(np.float32)
    norm = rng.standard_normal(64).astype(np.float32)
    out, alone = np.zeros((3, 64), np.float32), np.zeros((2, 64), np.float32)
    program = ops.Program()
    program.rmsnorm(x, norm, 1e-6, out)
    program.glu(out, y, out, activation="gelu_tanh")
    program.run(2, 0)
    ops.rmsnorm(x[:2], norm, 1e-6, alone)
    ops.glu(alone, y[:2], alone, activation="gelu_tanh")
    assert np.array_equal(out[:2], alone)
    assert not out[2:].any()


def test_weights_may_be_bound_between_runs(rng):
    first, second = (cases.random_packed("q4_0", 16, 64, rng).reshape(-1) for _ in range(2))
    weight = ops.PackedWeight("q4_0", 16, 64)
    x, out = np.ones((1, 64), np.float32), np.zeros((1, 16), np.float32)
    scratch = np.empty(ops.matmul_scratch_bytes(1, 64), np.uint8)
    program = ops.Program()
    program.matmul(x, [weight], [out], scratch=scratch)
    with pytest.raises(ValueError, match="no buffer"):
        program.run(1, 0)
    for buffer in (first, second):
        weight.bind(buffer)
        program.run(1, 0)
        wanted = np.zeros_like(out)
        ops.matmul(x, [ops.PackedWeight("q4_0", 16, 64, buffer)], [wanted], scratch=scratch)
        assert np.array_equal(out, wanted)


def test_a_program_keeps_its_arrays_alive_and_lets_them_go():
    x = np.ones((1, 32), np.float32)
    seen = weakref.ref(x)
    program = ops.Program()
    program.add_(x, x)
    del x
    program.run(1, 0)
    assert seen() is not None
    assert (seen() == 2).all()
    del program
    gc.collect()
    assert seen() is None


def test_wrong_arguments_are_refused():
    program = ops.Program()
    x = np.ones((2, 32), np.float32)
    with pytest.raises(TypeError):
        program.add_(x.astype(np.float64), x)
    program.add_(x, np.ones((2, 31), np.float32))
    with pytest.raises(ValueError, match="same shape"):
        program.run(1, 0)
    short = ops.Program()
    short.add_(x, x)
    with pytest.raises(ValueError, match="arrays have 2 rows, and it is run on 3 tokens"):
        short.run(3, 0)
    with pytest.raises(ValueError, match="1 token or more"):
        short.run(0, 0)
    assert (x == 1).all()
