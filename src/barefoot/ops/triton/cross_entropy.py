"""Cross-entropy of next tokens whose logits never leave the chip, forward and backward.

Cut Your Losses in Large-Vocabulary Language Models (Wijmans et al. 2024, arXiv:2411.09009); what is computed and what
the filter leaves out is written in ``barefoot.train.losses.cce``. A tile is ``TOKENS`` by ``WORDS`` logits, summed over
the channels in float32.

* ``log_sums``: a program takes a block of tokens and a run of the vocabulary, with a maximum that runs along; the
  runs' sums, (n_runs, n) each, are merged in order.
* ``gradients``: a program owns a block of tokens, goes through the vocabulary and adds to its own rows of the gradient
  by the hidden states; then a program owns a stretch of the vocabulary, goes through the tokens and adds to its own
  rows of the head's.

*Differs from the paper*: nothing is shared, so there are no locks and no atomic sums, and results are the same from run
to run; tiles are computed once more where the head is trained, of which the filter spares the products behind.

Bytes: float32 (n, d_model) and, where the head is trained in 16 bits, (vocabulary, d_model), in which gradients are
summed; 8 (n + n_runs n) around.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from barefoot.ops.triton.tiles import check_input, multiplied

TOKENS, WORDS, COLS = 64, 128, 32  # of a tile, and channels at a time
PROGRAMS = 512  # keep a device busy


@dataclass(frozen=True, eq=False)
class Logits:
    """What logits are made of.

    Attributes
    ----------
    hidden : float16, bfloat16 or float32 (N, d_model), contiguous.
    head : (vocabulary, d_model) of the same type, contiguous.
    labels : int64 (n,), of the tokens that predict.
    places : int64 (n,), which these are.
    bias : float32 (vocabulary,) or None.
    softcap : 0 where there is none.

    Raises
    ------
    TypeError, ValueError, BackendMissing : other types, shapes or devices.
    """

    hidden: torch.Tensor
    head: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float = 0.0

    def __post_init__(self) -> None:
        check_input(self.hidden, self.head.shape[1], self.head)
        if self.head.dtype != self.hidden.dtype or not self.head.is_contiguous():
            raise ValueError(f"the head must be contiguous {self.hidden.dtype}, got {self.head.dtype}")

    @property
    def n(self) -> int:
        return len(self.labels)

    def arguments(self) -> tuple[object, ...]:
        bias = self.head if self.bias is None else self.bias  # not read
        return self.hidden, self.head, bias, self.places, self.labels, self.n, *self.head.shape, self.softcap

    def constants(self) -> dict[str, object]:
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_CAP": bool(self.softcap),
            "TYPE": multiplied(self.hidden.dtype),
            "TOKENS": TOKENS,
            "WORDS": WORDS,
            "COLS": COLS,
        }


def log_sums(logits: Logits) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ exp of the logits, and the label's logit, float32 (n,) each."""
    blocks, stretches = triton.cdiv(logits.n, TOKENS), triton.cdiv(len(logits.head), WORDS)
    run = triton.cdiv(stretches, max(1, PROGRAMS // blocks))  # stretches of one
    n_runs = triton.cdiv(stretches, run)
    sums = logits.hidden.new_empty((n_runs, logits.n), dtype=torch.float32)
    correct = torch.empty_like(sums)
    _log_sums[(blocks, n_runs)](*logits.arguments(), sums, correct, run * WORDS, **logits.constants())
    return sums.logsumexp(0), correct.sum(0)


def gradients(
    logits: Logits,
    sums: torch.Tensor,
    scales: torch.Tensor,
    *,
    filter: float = 0.0,
    whole_head: bool = True,
    order: torch.Tensor | None = None,
    trains_head: bool = False,
    trains_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients by hidden states (N, d_model), head and bias, the latter two where they are trained.

    Parameters
    ----------
    sums : log Σ exp, float32 (n,).
    scales : the gradients by the losses, float32 (n,).
    filter : tiles in which every |p - 1[v = x]| is smaller are not multiplied; the head's are if ``whole_head``.
    order : int64 (vocabulary,), in which tiles go through the vocabulary.
    """
    blocks, stretches = triton.cdiv(logits.n, TOKENS), triton.cdiv(len(logits.head), WORDS)
    some = logits.labels if order is None else order  # not read where nothing is sorted
    of_tokens = logits.hidden.new_zeros(logits.n, logits.hidden.shape[1], dtype=torch.float32)
    constants = logits.constants() | {"SORTED": order is not None}
    arguments = *logits.arguments(), sums, scales, some
    _by_hidden[(blocks,)](*arguments, of_tokens, filter, **constants)
    by_hidden = logits.hidden.new_zeros(logits.hidden.shape)
    by_hidden[logits.places] = of_tokens.to(by_hidden.dtype)
    if not trains_head and not trains_bias:
        return by_hidden, None, None
    by_head = logits.head.new_zeros(logits.head.shape if trains_head else (0,), dtype=torch.float32)
    by_bias = by_head.new_zeros(len(logits.head) if trains_bias else 0)
    _by_head[(stretches,)](
        *arguments,
        by_head,
        by_bias,
        0.0 if whole_head else filter,
        FOR_HEAD=trains_head,
        FOR_BIAS=trains_bias,
        **constants,
    )
    return by_hidden, by_head.to(logits.head.dtype) if trains_head else None, by_bias if trains_bias else None


@triton.jit
def _tile(
    hidden, head, bias, row, is_token, word, is_word, n_cols, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TYPE: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Logits float32 [TOKENS, WORDS], capped; -inf where there is no word."""
    total = tl.zeros((TOKENS, WORDS), tl.float32)
    for k in range(0, n_cols, COLS):
        col = k + tl.arange(0, COLS)
        of_x, of_c = is_token[:, None] & (col < n_cols)[None, :], is_word[None, :] & (col < n_cols)[:, None]
        x = tl.load(hidden + row[:, None] * n_cols + col[None, :], mask=of_x, other=0)
        c = tl.load(head + word[None, :] * n_cols + col[:, None], mask=of_c, other=0)
        total = tl.dot(x.to(TYPE), c.to(TYPE), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + word, mask=is_word, other=0)[None, :]
    if HAS_CAP:
        total = cap * (2 * tl.sigmoid(2 * total / cap) - 1)
    return tl.where(is_word[None, :], total, float("-inf"))


@triton.jit
def _log_sums(
    hidden, head, bias, places, labels, n_tokens, n_words, n_cols, cap,
    sums,  # float32 (n_runs, n_tokens), as is correct
    correct,
    run,  # words of one
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TYPE: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < n_tokens
    row = tl.load(places + token, mask=is_token, other=0)
    label = tl.load(labels + token, mask=is_token, other=-1)
    top = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    right = tl.zeros((TOKENS,), tl.float32)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, n_words), WORDS):
        word = (start + tl.arange(0, WORDS)).to(tl.int64)
        tile = _tile(
            hidden, head, bias, row, is_token, word, word < n_words, n_cols, cap,
            HAS_BIAS, HAS_CAP, TYPE, TOKENS, WORDS, COLS,
        )  # fmt: skip
        right += tl.sum(tl.where(word[None, :] == label[:, None], tile, 0.0), axis=1)
        highest = tl.maximum(top, tl.max(tile, axis=1))
        total = total * tl.exp(top - highest) + tl.sum(tl.exp(tile - highest[:, None]), axis=1)
        top = highest
    place = tl.program_id(1).to(tl.int64) * n_tokens + token
    tl.store(sums + place, top + tl.log(total), mask=is_token)
    tl.store(correct + place, right, mask=is_token)


@triton.jit
def _errors(
    hidden, head, bias, sums, row, label, token, is_token, word, is_word, n_cols, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TYPE: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """p - 1[v = x] and, of the cap, the slopes, [TOKENS, WORDS]."""
    tile = _tile(
        hidden, head, bias, row, is_token, word, is_word, n_cols, cap,
        HAS_BIAS, HAS_CAP, TYPE, TOKENS, WORDS, COLS,
    )  # fmt: skip
    some = is_token[:, None] & is_word[None, :]
    p = tl.exp(tile - tl.load(sums + token, mask=is_token, other=0)[:, None])
    errors = tl.where(some, p - (word[None, :] == label[:, None]).to(tl.float32), 0.0)
    slopes = tl.full((TOKENS, WORDS), 1.0, tl.float32)
    if HAS_CAP:
        share = tl.where(some, tile, 0.0) / cap
        slopes = 1 - share * share
    return errors, slopes


@triton.jit
def _matters(errors, filter):
    """Whether one is not below the filter, NaN among them."""
    return tl.sum(tl.sum(tl.where(tl.abs(errors) < filter, 0, 1), axis=1), axis=0) > 0


@triton.jit
def _by_hidden(
    hidden, head, bias, places, labels, n_tokens, n_words, n_cols, cap, sums, scales, order,
    out,  # float32 (n_tokens, n_cols), zeros
    filter,
    SORTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TYPE: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < n_tokens
    row = tl.load(places + token, mask=is_token, other=0)
    label = tl.load(labels + token, mask=is_token, other=-1)
    scale = tl.load(scales + token, mask=is_token, other=0)[:, None]
    for start in range(0, n_words, WORDS):
        word = (start + tl.arange(0, WORDS)).to(tl.int64)
        is_word = word < n_words
        if SORTED:
            word = tl.load(order + word, mask=is_word, other=0)
        errors, slopes = _errors(
            hidden, head, bias, sums, row, label, token, is_token, word, is_word, n_cols, cap,
            HAS_BIAS, HAS_CAP, TYPE, TOKENS, WORDS, COLS,
        )  # fmt: skip
        if _matters(errors, filter):
            scaled = (errors * scale * slopes).to(TYPE)
            for k in range(0, n_cols, COLS):
                col = k + tl.arange(0, COLS)
                is_col = (col < n_cols)[None, :]
                c = tl.load(head + word[:, None] * n_cols + col[None, :], mask=is_word[:, None] & is_col, other=0)
                place, some = out + token.to(tl.int64)[:, None] * n_cols + col[None, :], is_token[:, None] & is_col
                before = tl.load(place, mask=some, other=0)
                tl.store(place, before + tl.dot(scaled, c.to(TYPE), input_precision="ieee"), mask=some)
            tl.debug_barrier()  # other threads of the program may read these sums next


@triton.jit
def _by_head(
    hidden, head, bias, places, labels, n_tokens, n_words, n_cols, cap, sums, scales, order,
    out,  # float32 (n_words, n_cols), zeros
    of_bias,  # float32 (n_words,)
    filter,
    FOR_HEAD: tl.constexpr, FOR_BIAS: tl.constexpr,
    SORTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TYPE: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    word = (tl.program_id(0) * WORDS + tl.arange(0, WORDS)).to(tl.int64)
    is_word = word < n_words
    if SORTED:
        word = tl.load(order + word, mask=is_word, other=0)
    total = tl.zeros((WORDS,), tl.float32)
    for start in range(0, n_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        is_token = token < n_tokens
        row = tl.load(places + token, mask=is_token, other=0)
        label = tl.load(labels + token, mask=is_token, other=-1)
        errors, slopes = _errors(
            hidden, head, bias, sums, row, label, token, is_token, word, is_word, n_cols, cap,
            HAS_BIAS, HAS_CAP, TYPE, TOKENS, WORDS, COLS,
        )  # fmt: skip
        kept = _matters(errors, filter)
        errors = errors * tl.load(scales + token, mask=is_token, other=0)[:, None] * slopes
        if FOR_BIAS:
            total += tl.sum(errors, axis=0)
        if FOR_HEAD and kept:
            across = tl.trans(errors).to(TYPE)
            for k in range(0, n_cols, COLS):
                col = k + tl.arange(0, COLS)
                is_col = (col < n_cols)[None, :]
                x = tl.load(hidden + row[:, None] * n_cols + col[None, :], mask=is_token[:, None] & is_col, other=0)
                place, some = out + word[:, None] * n_cols + col[None, :], is_word[:, None] & is_col
                before = tl.load(place, mask=some, other=0)
                tl.store(place, before + tl.dot(across, x.to(TYPE), input_precision="ieee"), mask=some)
            tl.debug_barrier()  # other threads of the program may read these sums next
    if FOR_BIAS:
        tl.store(of_bias + word, total, mask=is_word)
