"""NF4 whose scales are quantized a second time: a matrix as one array of bytes.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3). The matrix is taken as one row of N weights, in blocks of
``group``, the last one filled up with zeros. With s the largest magnitude of each block, μ the mean of all s, and t the
largest magnitude of s − μ among 256 blocks that follow each other,

    w = s × level[q]        s = μ + t × step[p]        q in 0 … 15, p in 0 … 255

``level`` are those of NF4, ``step`` those of :func:`steps`; q and p are the nearest ones, q with the s that is not
rounded yet. All numbers of more than one byte are little-endian:

============================== ========================================================================================
bytes                          content
============================== ========================================================================================
0-3                            μ, f32
4 ⌈⌈N / group⌉ / 256⌉          t, f32
⌈N / group⌉                    p
⌈N / 2⌉                        q, weight 2i in the high four bits of byte i, weight 2i + 1 in the low ones
============================== ========================================================================================

4.127 bits a weight with groups of 64, where f32 scales take 4.5 and f16 ones 4.25.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

SECOND = 256  # blocks whose scales share a scale
PIECE = 1 << 16  # weights that are decoded at a time: their indices stay in the caches
_OUTERMOST = 0.9677083  # the share of the normal distribution below its highest level


@functools.cache
def levels() -> F32:
    """The sixteen of NF4, ascending: quantiles of the normal distribution at equal distances, eight from its upper end
    to its middle and seven from its lower one, and zero, over the largest."""
    from statistics import NormalDist

    def quantiles(n: int) -> list[float]:
        return [NormalDist().inv_cdf(_OUTERMOST + (0.5 - _OUTERMOST) * i / n) for i in range(n)]

    upper, lower = quantiles(8), quantiles(7)
    return np.array(sorted([*upper, 0.0, *(-each for each in lower)]), np.float32) / np.float32(upper[0])


@functools.cache
def steps() -> F32:
    """256 numbers from below −0.99 to 1, ascending: floats of a sign, a decimal exponent and a linear fraction.

    For e in 0 … 6, the 2^e middles of equal parts of 0.1 … 1, times 10^(e − 6), with both signs; zero and one.
    """
    found = [0.0, 1.0]
    for e in range(7):
        middles = 10.0 ** (e - 6) * (0.1 + 0.9 * (np.arange(2**e) + 0.5) / 2**e)
        found += [*middles, *-middles]
    return np.array(sorted(found), np.float32)


def sizes(n: int, group: int) -> tuple[int, int, int]:
    """How many scales of scales, scales, and bytes of codes ``n`` weights have."""
    n_blocks = -(-n // group)
    return -(-n_blocks // SECOND), n_blocks, -(-n // 2)


def n_bytes(n: int, group: int) -> int:
    """Of ``n`` weights."""
    of_scales, scales, codes = sizes(n, group)
    return 4 + 4 * of_scales + scales + codes


def encode(pieces: Iterable[F32], n: int, group: int) -> U8:
    """The bytes of ``n`` weights, which come in their order in arrays of any shapes.

    Raises
    ------
    InvalidInput : NaN or infinite weights, or another number of them.
    """
    of_scales, n_blocks, n_codes = sizes(n, group)
    stored = np.empty(n_bytes(n, group), np.uint8)
    scales, codes = np.zeros(n_blocks, np.float32), stored[-n_codes:]
    left, block, done = np.zeros(0, np.float32), 0, 0
    for piece in pieces:
        done += piece.size
        if done > n:
            break
        flat = np.concatenate([left, piece.reshape(-1)]) if len(left) else piece.reshape(-1)
        whole = len(flat) // group
        for at in range(0, whole, PIECE // group):
            some = flat[at * group : min(whole * group, at * group + PIECE)].reshape(-1, group)
            _first(some, scales, codes, block + at)
        left, block = flat[whole * group :], block + whole
    if done != n:
        raise InvalidInput(f"expected {n} weights, got {'more' if done > n else done}")
    if len(left):
        _first(np.pad(left, (0, group - len(left)))[None], scales, codes, block)
    stored[: 4 + 4 * of_scales + n_blocks] = _second(scales)
    return stored


def _first(blocks: F32, scales: F32, codes: U8, block: int) -> None:
    """Scales and codes of blocks (n, group), the first of which is number ``block``."""
    if not np.isfinite(blocks).all():
        raise InvalidInput("weights hold NaN or infinity, which NF4 can't store", cure="use f32, f16 or bf16")
    n, group = blocks.shape
    largest = np.abs(blocks).max(axis=1, initial=0)
    scales[block : block + n] = largest
    ratios = blocks / np.where(largest > 0, largest, 1)[:, None]
    found = np.zeros(blocks.shape, np.uint8)
    for bound in (levels()[1:] + levels()[:-1]) * np.float32(0.5):
        found += ratios > bound
    pairs = found.reshape(-1, 2)
    first = block * group // 2
    into = codes[first : first + len(pairs)]
    into[:] = (pairs[:, 0] << 4 | pairs[:, 1])[: len(into)]


def _second(scales: F32) -> U8:
    """What is in front of the codes."""
    mean = scales.mean(dtype=np.float32) if len(scales) else np.float32(0)
    rest = np.pad(scales - mean, (0, -len(scales) % SECOND)).reshape(-1, SECOND)
    largest = np.abs(rest).max(axis=1)
    ratios = rest / np.where(largest > 0, largest, 1)[:, None]
    found = np.searchsorted((steps()[1:] + steps()[:-1]) * np.float32(0.5), ratios.reshape(-1))[: len(scales)]
    numbers = np.concatenate([[mean], largest]).astype("<f4").view(np.uint8)
    return np.concatenate([numbers, found.astype(np.uint8)])


def span(group: int, first: int, stop: int) -> tuple[int, int]:
    """First weight and end of the blocks that hold weights ``first`` to ``stop``."""
    return first // group * group, -(-stop // group) * group


def decode(stored: U8, n: int, group: int, first: int, stop: int, room: F32 | None = None) -> F32:
    """Weights ``first`` to ``stop`` of ``n``, in new memory or in ``room``, which has their ``span``."""
    of_scales, n_blocks, n_codes = sizes(n, group)
    numbers = stored[: 4 + 4 * of_scales].view("<f4")
    second, codes = stored[4 + 4 * of_scales :][:n_blocks], stored[-n_codes:]
    begin, end = span(group, first, stop)
    out = np.empty(end - begin, np.float32) if room is None else room
    for at in range(begin, stop, PIECE):
        part = out[at - begin : at - begin + PIECE]
        block = np.arange(at // group, (at + len(part)) // group)
        found = codes[at // 2 : (at + len(part)) // 2]
        part.view(np.uint64)[: len(found)] = _pairs()[found]
        part[2 * len(found) :] = 0
        scales = numbers[0] + numbers[1 + block // SECOND] * steps()[second[block]]
        part.reshape(-1, group)[:] *= scales[:, None]
    return out[first - begin : stop - begin]


@functools.cache
def _pairs() -> npt.NDArray[np.uint64]:
    """For each byte of codes the bits of its two levels."""
    byte = np.arange(256)
    return np.stack([levels()[byte >> 4], levels()[byte & 15]], axis=1).view(np.uint64).reshape(-1)
