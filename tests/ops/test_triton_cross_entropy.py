"""Cross-entropy in Triton against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
pytest.importorskip("triton", reason="the Triton kernels need triton: pip install 'barefoot[gpu]'")

import torch.nn.functional as F  # noqa: E402

from barefoot.ops.triton import cross_entropy as kernels  # noqa: E402
from barefoot.ops.triton import tiles  # noqa: E402
from barefoot.train import NOTHING  # noqa: E402
from barefoot.train.driver import cross_entropy as driver  # noqa: E402
from barefoot.train.losses.cce import CutCrossEntropy  # noqa: E402

DEVICE = "cpu" if tiles.interpreted() else "cuda"  # tests/conftest.py looks which
N, D, V = 150, 40, 300  # blocks of 64, 64 and 22 tokens; stretches of 128, 128 and 44 words; a last 8 channels
#: Of gradients, in the Frobenius norm; the interpreter cuts bfloat16 off.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7 if tiles.interpreted() else 2.0**-8}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """The driver takes them, wherever tensors lie."""
    torch.manual_seed(3)
    monkeypatch.setattr(driver, "_kernels", lambda hidden, weight: kernels)


def problem(dtype=torch.float32, bias=True, trained=True):
    hidden = torch.randn(N, D, device=DEVICE, dtype=dtype).requires_grad_()
    head = torch.randn(V, D, device=DEVICE, dtype=dtype).requires_grad_(trained)
    shift = torch.randn(V, device=DEVICE).requires_grad_(trained) if bias else None
    labels = torch.randint(0, V, (N,), device=DEVICE)
    labels[::4] = NOTHING
    return hidden, head, shift, labels


def plain64(hidden, head, bias, labels, softcap):
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    logits = leaves[0] @ leaves[1].T
    if bias is not None:
        logits = logits + leaves[2]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=NOTHING), leaves


def apart(ours, exact):
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("bias", "trained"), [(False, False), (False, True), (True, True)])
def test_loss_and_gradients_are_those_of_float64(dtype, softcap, bias, trained):
    hidden, head, shift, labels = problem(dtype, bias, trained)
    ours = driver.cross_entropy(CutCrossEntropy(), hidden, head, labels, bias=shift, softcap=softcap)
    ours.backward()
    exact, leaves = plain64(hidden, head, shift, labels, softcap)
    exact.backward()
    assert apart(ours, exact) < 2e-6  # products are exact in both types, sums are float32
    assert apart(hidden.grad, leaves[0].grad) < ROUNDING[dtype]
    assert not hidden.grad[labels == NOTHING].any()
    for x, leaf in zip((head, shift), leaves[1:], strict=True):
        if x is not None and trained:
            assert x.grad.dtype == x.dtype
            assert apart(x.grad, leaf.grad) < ROUNDING[dtype]


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("whole_head", [False, True])
def test_the_filter_leaves_out_whole_tiles(sort, whole_head):
    hidden, head, _, labels = problem(bias=False)
    with torch.no_grad():
        head *= 0.05
        head[:30] += 0.2  # likely, as hidden states lie along the diagonal
        hidden += 1
        labels.remainder_(30).masked_fill_(labels % 4 == 3, NOTHING)
    loss = CutCrossEntropy(filter=0.02, sort=sort, whole_head=whole_head)
    driver.cross_entropy(loss, hidden, head, labels, reduction="sum").backward()
    places = (labels != NOTHING).nonzero().squeeze(1)
    x, c = hidden.detach().double()[places], head.detach().double()
    errors = (x @ c.T).softmax(1)
    errors[torch.arange(len(places)), labels[places]] -= 1
    order = (c @ x.mean(0)).argsort() if sort else torch.arange(V)
    kept, n_left_out = errors.clone(), 0
    for i in range(0, len(places), kernels.TOKENS):
        for v in range(0, V, kernels.WORDS):
            words = order[v : v + kernels.WORDS]
            if errors[i : i + kernels.TOKENS, words].abs().max() < loss.filter:
                kept[i : i + kernels.TOKENS, words] = 0
                n_left_out += 1
    assert 0 < n_left_out < 6
    assert apart(hidden.grad[places], kept @ c) < 2e-6
    assert apart(head.grad, (errors if whole_head else kept).T @ x) < 2e-6


def test_few_tokens_share_the_vocabulary_among_programs(monkeypatch):
    hidden, head, bias, labels = problem()
    found = []
    for programs in (1, 6, 512):  # one run, runs of two stretches and of one
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        places = torch.arange(N, device=DEVICE)
        found.append(kernels.log_sums(kernels.Logits(hidden.detach(), head.detach(), labels, places, bias.detach()))[0])
    exact = (hidden.double() @ head.double().T + bias.double()).logsumexp(1)
    assert all(apart(sums, exact) < 1e-6 for sums in found)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # the interpreter's numpy
def test_nan_stays_in_its_row_and_is_not_filtered():
    hidden, head, _, labels = problem(bias=False, trained=False)
    with torch.no_grad():
        hidden[5, 3] = torch.nan
    loss = CutCrossEntropy(filter=0.9)
    each = driver.cross_entropy(loss, hidden, head, labels, reduction="none")
    each.sum().backward()
    assert each.isnan().nonzero().flatten().tolist() == [5]
    assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [5]


def test_wrong_arguments_are_refused():
    hidden, head, _, labels = problem(bias=False, trained=False)
    places = torch.arange(N, device=DEVICE)
    with pytest.raises(ValueError, match=r"contiguous \(n_tokens, 39\), got \(150, 40\)"):
        kernels.Logits(hidden, head[:, 1:], labels, places)
    with pytest.raises(ValueError, match=r"head must be contiguous torch.float32, got torch.bfloat16"):
        kernels.Logits(hidden, head.bfloat16(), labels, places)


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from barefoot.ops.triton import cross_entropy as k

floats = {"sums": "*fp32", "correct": "*fp32", "scales": "*fp32", "out": "*fp32", "of_bias": "*fp32", "bias": "*fp32"}
types = {"hidden": "*bf16", "head": "*bf16", "places": "*i64", "labels": "*i64", "order": "*i64"} | floats
types |= {"cap": "fp32", "filter": "fp32"}
tile = {"TOKENS": k.TOKENS, "WORDS": k.WORDS, "COLS": k.COLS, "TYPE": tl.bfloat16, "HAS_BIAS": True, "HAS_CAP": True}
more = {"SORTED": True, "FOR_HEAD": True, "FOR_BIAS": True}
for kernel in (k._log_sums, k._by_hidden, k._by_head):
    given = {n: v for n, v in (tile | more).items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in given else types.get(n, "i32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in types or n == "n_cols"}
    aligned = {key: value for key, value in aligned.items() if kernel.arg_names[key[0]] not in ("cap", "filter")}
    source = ASTSource(kernel, signature, given, aligned)
    print(triton.compile(source, GPUTarget("cuda", 80, 32), {"num_warps": 4}).asm["ptx"])
    print("=" * 20)
"""


def test_machine_code_multiplies_in_tensor_cores_and_takes_no_locks():
    """Compiled for a processor that need not be here; the interpreter's flag would leave nothing to compile."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    codes = done.stdout.split("=" * 20)[:3]
    assert len(codes) == 3
    for code in codes:
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in code
        assert not re.search(r"\b(atom|red)\.", code)
