"""Blocks of signs and low rank: the layout bit by bit, and products against float64, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import CorruptFile
from barefoot.ops import signs
from barefoot.ops.scratch import BFLOAT16_TOKENS, SIGN_TOKENS

EPS = 2.0**-24
#: rows, cols, rank, blocks, tokens: ranks within and beyond one look at the bits, ends of panels, quads and groups.
CASES = (
    (1, 1, 1, 1, 1),
    (16, 64, 1, 2, 6),
    (37, 333, 5, 3, 3),
    (192, 576, 2, 16, 1),
    (70, 1300, 16, 2, 2),
    (15, 4, 64, 2, 5),
    (33, 97, 3, 2, 9),
    (100, 640, 7, 2, 23),
)


def random_stack(rows, cols, rank, n_blocks, rng):
    def factors(*shape):
        return (rng.standard_normal(shape) + 0.5).astype(np.float16)

    blocks = [
        signs.pack(rng.random((rows, cols)) < 0.5, factors(rows, rank), factors(rank, cols)) for _ in range(n_blocks)
    ]
    return ops.SignStack(rows, cols, rank, blocks)


def decoded(stack):
    return sum(signs.decode(stack.rows, stack.cols, np.asarray(b)).astype(np.float64) for b in stack.buffers)


def magnitudes(x, stack):
    """What the terms of each output sum to at most, before signs: what rounding errors are relative to."""
    out = np.zeros((len(x), stack.rows))
    for block in stack.buffers:
        _, u, v = signs.unpack(stack.rows, stack.cols, np.asarray(block))
        out += np.abs(x).astype(np.float64) @ (np.abs(u).astype(np.float64) @ np.abs(v).astype(np.float64)).T
    return out


def n_sums(stack):
    return stack.cols + (stack.rank + 1) * len(stack.buffers)


def scratch_for(x, stack, activations):
    return ops.sign_scratch_bytes(*x.shape, stack.rank, len(stack.buffers), activations)


def product(x, stack, activations="int8", **options):
    out = np.full((len(x), stack.rows), np.float32(7))
    scratch = np.empty(scratch_for(x, stack, activations), np.uint8)
    ops.sign_matmul(x, stack, out, activations=activations, scratch=scratch, **options)
    return out


# --- layout ---


def test_the_documented_example():
    negative = np.zeros((32, 64), np.bool_)
    negative[17, 9] = True
    u, v = np.zeros((32, 3), np.float16), np.zeros((3, 64), np.float16)
    u[17, 2], v[1, 5] = 1, 2
    block = signs.pack(negative, u, v)
    assert block.size == 192 + 384 + 8 * 2 * 16 == 32 * 64 // 8 + 2 * 3 * (32 + 64) == signs.block_bytes(32, 64, 3)
    assert block[576 + 8 * (1 * 16 + 2) :][:8].view("<u8")[0] == 1 << 4 * 1 + 1
    assert block[:192].view("<f2").nonzero()[0].tolist() == [1 * 3 * 16 + 2 * 16 + 1]
    assert block[192:576].view("<f2").nonzero()[0].tolist() == [64 + 5]
    assert np.count_nonzero(block) == 3


@pytest.mark.parametrize(("rows", "cols", "rank"), [(1, 1, 1), (16, 4, 64), (37, 333, 5), (192, 576, 2)])
def test_packing_is_exact(rows, cols, rank, rng):
    negative = rng.random((rows, cols)) < 0.5
    u, v = rng.standard_normal((rows, rank)).astype(np.float16), rng.standard_normal((rank, cols)).astype(np.float16)
    block = signs.pack(negative, u, v)
    assert signs.rank_of(rows, cols, block.size) == rank
    for got, expected in zip(signs.unpack(rows, cols, block), (negative, u, v), strict=True):
        assert np.array_equal(got, expected)
    dense = np.where(negative, -1, 1) * (u.astype(np.float64) @ v.astype(np.float64))
    assert np.allclose(
        signs.decode(rows, cols, block), dense, rtol=0, atol=rank * EPS * np.abs(u).max() * np.abs(v).max()
    )
    assert ops.SignStack(rows, cols, rank).block_bytes == block.size


def test_bytes_that_are_no_block():
    size = signs.block_bytes(32, 64, 3)
    for wrong in (size - 1, size + 64, signs.block_bytes(32, 64, 0), signs.block_bytes(32, 64, 65), 0):
        with pytest.raises(CorruptFile, match=f"{wrong} bytes can't be signs and factors of 32 rows and 64 columns"):
            signs.unpack(32, 64, np.zeros(wrong, np.uint8))


# --- products ---


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_of_the_reference(isa, case, rng, threads):
    *shape, n_tokens = case
    threads(1 + n_tokens % 3)
    stack = random_stack(*shape, rng)
    plain = signs.SignStack(stack.rows, stack.cols, stack.rank, [np.asarray(b) for b in stack.buffers])
    x = rng.standard_normal((n_tokens, stack.cols)).astype(np.float32)
    bound = n_sums(stack) * EPS * magnitudes(x, stack)
    assert (np.abs(product(x, stack, "float32") - x @ decoded(stack).T) <= bound).all()
    rounds = n_tokens <= SIGN_TOKENS
    expected = signs.product(x, plain, rounds=rounds)
    assert (np.abs(product(x, stack) - expected) <= bound).all()
    if rounds and stack.cols > 1:  # the rounding is there, and is that of int8: half a step of each group's largest
        error = np.abs(expected - x @ decoded(stack).T)
        assert EPS * magnitudes(x, stack).max() < error.max() < magnitudes(x, stack).max() / 127


def test_integers_are_exact(isa, rng):
    """Factors and inputs whose products are whole numbers up to 127, the largest in every group: nothing is rounded."""
    rows, cols, rank = 50, 700, 9
    v = rng.integers(1, 2, (rank, cols)).astype(np.float16)
    u = rng.integers(-3, 4, (rows, rank)).astype(np.float16)
    x = rng.integers(-127, 128, (3, cols)).astype(np.float32)
    x[:, :: signs.GROUP] = 127
    negative = rng.random((rows, cols)) < 0.5
    stack = ops.SignStack(rows, cols, rank, [signs.pack(negative, u, v)])
    exact = x.astype(np.int64) @ (np.where(negative, -1, 1) * u.astype(np.int64).sum(axis=1, keepdims=True)).T
    assert np.abs(exact).max() < 2**24
    assert np.array_equal(product(x, stack), exact)


@pytest.mark.parametrize("n_tokens", [BFLOAT16_TOKENS, 150])
def test_bfloat16_where_there_are_tiles(isa, n_tokens, rng):
    """Weights and inputs are off by 2^-9 of themselves at most, each; elsewhere this is a float32 product."""
    stack = random_stack(70, 608, 3, 2, rng)
    x = rng.standard_normal((n_tokens, stack.cols)).astype(np.float32)
    exact, most = x @ decoded(stack).T, np.abs(x).astype(np.float64) @ np.abs(decoded(stack)).T
    error = np.abs(product(x, stack) - exact)
    rounding = n_sums(stack) * EPS * magnitudes(x, stack)
    if isa == "amx":
        assert (error <= 2 * 2.0**-9 * (1 + 2.0**-9) * most + rounding).all()
        assert error.max() > 2.0**-16 * most.max()
    else:
        assert (error <= rounding).all()


@pytest.mark.parametrize("n_tokens", [1, SIGN_TOKENS, SIGN_TOKENS + 3, 40])
def test_results_do_not_depend_on_threads_runs_or_alignment(isa, n_tokens, threads, rng):
    stack = random_stack(333, 1100, 6, 2, rng)
    moved = []
    for block in stack.buffers:
        backing = np.zeros(np.asarray(block).size + 3, np.uint8)
        backing[3:] = block
        moved.append(backing[3:])
    shifted = ops.SignStack(333, 1100, 6, moved)
    x = rng.standard_normal((n_tokens, 1100)).astype(np.float32)
    seen = set()
    for n in (1, 2, 3, 3):
        threads(n)
        seen |= {product(x, stack).tobytes(), product(x, shifted).tobytes()}
    assert len(seen) == 1


def test_few_tokens_are_what_each_is_alone(isa, rng):
    stack = random_stack(40, 200, 4, 3, rng)
    x = rng.standard_normal((SIGN_TOKENS, 200)).astype(np.float32)
    alone = [product(x[t : t + 1], stack)[0] for t in range(SIGN_TOKENS)]
    assert np.array_equal(product(x, stack), np.stack(alone))


@pytest.mark.parametrize("n_tokens", [3, 9, 30])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_with_nan_or_infinity(isa, bad, n_tokens, rng):
    stack = random_stack(20, 224, 2, 2, rng)
    x = rng.standard_normal((n_tokens, 224)).astype(np.float32)
    clean = product(x, stack)
    x[1, 77] = bad
    got = product(x, stack)
    assert not np.isfinite(got[1]).any()
    assert np.array_equal(np.delete(got, 1, axis=0), np.delete(clean, 1, axis=0))


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-31, 1e30])
def test_extreme_magnitudes(isa, largest):
    stack = ops.SignStack(
        5, 9, 1, [signs.pack(np.zeros((5, 9), np.bool_), np.ones((5, 1), "f2"), np.ones((1, 9), "f2"))]
    )
    expected = 9 * (largest if largest > 2.0**-100 else 0.0)  # below, a group counts as zero
    assert np.allclose(product(np.full((2, 9), largest, np.float32), stack), expected, rtol=4 * EPS, atol=0)


def test_add_and_bind(isa, rng):
    stack = random_stack(18, 96, 2, 3, rng)
    blocks = list(stack.buffers)
    for n_tokens in (3, 12):
        x = rng.standard_normal((n_tokens, 96)).astype(np.float32)
        stack.bind(blocks)
        whole = product(x, stack, "float32")
        out = np.zeros((n_tokens, 18), np.float32)
        scratch = np.empty(scratch_for(x, stack, "float32"), np.uint8)
        for block in blocks:
            stack.bind([block])
            ops.sign_matmul(x, stack, out, activations="float32", add=True, scratch=scratch)
        assert np.allclose(out, whole, rtol=0, atol=8 * EPS * np.abs(whole).max() * len(blocks))


def test_a_program_uses_the_blocks_that_are_bound_when_it_runs(isa, rng):
    stack = random_stack(18, 96, 2, 3, rng)
    blocks = list(stack.buffers)
    x, out = rng.standard_normal((8, 96)).astype(np.float32), np.zeros((8, 18), np.float32)
    scratch = np.empty(max(scratch_for(x[:n], stack, "int8") for n in (1, 8)), np.uint8)
    program = ops.Program()
    program.sign_matmul(x, stack, out, scratch=scratch)
    for n_blocks in (3, 1, 2):
        stack.bind(blocks[:n_blocks])
        for n_tokens in (1, 8):
            program.run(n_tokens, 0)
            assert np.array_equal(out[:n_tokens], product(x[:n_tokens], stack))


# --- memory and arguments ---


def test_the_stated_scratch_is_exactly_what_is_used(isa, threads, rng):
    threads(3)
    stack = random_stack(50, 352, 5, 2, rng)
    for n_tokens in (1, SIGN_TOKENS, SIGN_TOKENS + 1, BFLOAT16_TOKENS, 130):
        for activations in ("int8", "float32"):
            x, out = np.ones((n_tokens, 352), np.float32), np.empty((n_tokens, 50), np.float32)
            size = scratch_for(x, stack, activations)
            guarded = np.full(size + 128, 0xA5, np.uint8)
            ops.sign_matmul(x, stack, out, activations=activations, scratch=guarded[64 : 64 + size])
            assert (guarded[:64] == 0xA5).all()
            assert (guarded[64 + size :] == 0xA5).all()
            with pytest.raises(ValueError, match=f"scratch: expected {size}, got {size - 1}"):
                ops.sign_matmul(x, stack, out, activations=activations, scratch=guarded[: size - 1])


def test_wrong_arguments_are_refused(rng):
    stack = random_stack(18, 96, 2, 1, rng)
    x, out, scratch = np.zeros((2, 96), np.float32), np.zeros((2, 18), np.float32), np.zeros(1 << 20, np.uint8)
    with pytest.raises(ValueError, match="columns of the stack: expected 95, got 96"):
        ops.sign_matmul(x[:, :95].copy(), stack, out, scratch=scratch)
    with pytest.raises(ValueError, match="columns of the output: expected 18, got 17"):
        ops.sign_matmul(x, stack, out[:, :17].copy(), scratch=scratch)
    with pytest.raises(ValueError, match="activations must be int8 or float32, got 'int4'"):
        ops.sign_matmul(x, stack, out, activations="int4", scratch=scratch)
    with pytest.raises(ValueError, match="no blocks"):
        ops.sign_matmul(x, ops.SignStack(18, 96, 2), out, scratch=scratch)
    with pytest.raises(ValueError, match=f"{stack.block_bytes - 1}"):
        stack.bind([np.zeros(stack.block_bytes - 1, np.uint8)])
    with pytest.raises(ValueError, match="rank of 1 to 64"):
        ops.SignStack(18, 96, 65)
    with pytest.raises(ValueError, match="needs"):
        stack.bind([])
