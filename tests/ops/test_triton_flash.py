"""Triton's attention that trains, against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
pytest.importorskip("triton", reason="the Triton kernels need triton: pip install 'barefoot[gpu]'")

from barefoot.core.errors import BackendMissing  # noqa: E402
from barefoot.ops import flash as reference  # noqa: E402
from barefoot.ops.triton import flash, tiles  # noqa: E402

DEVICE = "cpu" if tiles.interpreted() else "cuda"
#: Of a number that is stored, or multiplied, in that type; the interpreter cuts bfloat16 off.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0 ** (-7 if DEVICE == "cpu" else -8)}


def inputs(lengths, n_heads, n_kv_heads, head_dim, dtype, rng):
    """q, k, v and the gradient of the outputs, with two rows behind the documents."""
    n = sum(lengths) + 2
    shapes = [(n, heads, head_dim) for heads in (n_heads, n_kv_heads, n_kv_heads, n_heads)]
    return [torch.from_numpy(rng.standard_normal(s).astype(np.float32)).to(DEVICE, dtype) for s in shapes]


def attend(given, lengths, **options):
    q, k, v, d_out = given
    out, lse = flash.flash_forward(q, k, v, lengths, **options)
    return out, lse, *flash.flash_backward(d_out, q, k, v, out, lse, lengths, **options)


def expected(given, lengths, **options):
    q, k, v, d_out = (x.double().cpu().numpy() for x in given)
    lengths = np.array(lengths, np.int64)
    out, lse, gradients = np.empty_like(q), np.empty(q.shape[1::-1]), [np.empty_like(x) for x in (q, k, v)]
    reference.flash_forward(q, k, v, lengths, out, lse, **options)
    reference.flash_backward(d_out, q, k, v, out, lse, lengths, *gradients, **options)
    return out, lse, *gradients


@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "window", "softcap", "dtype"),
    [
        ((40,), (1, 1), 16, 0, 0.0, torch.float32),
        ((17, 0, 3, 150), (6, 2), 34, 0, 0.0, torch.float32),
        ((200, 33), (2, 1), 80, 50, 3.0, torch.float32),
        ((130, 60), (2, 2), 64, 7, 0.0, torch.float32),
        ((300, 60), (2, 2), 64, 129, 50.0, torch.float32),
        ((130, 60), (3, 1), 64, 0, 0.0, torch.float16),
        ((150,), (1, 1), 256, 100, 0.0, torch.bfloat16),
    ],
)
def test_outputs_and_gradients_are_the_reference(lengths, heads, head_dim, window, softcap, dtype, rng):
    """Numbers are rounded where they are multiplied and stored, a few times each, and sums of ``head_dim`` products
    as often as they have terms."""
    given = inputs(lengths, *heads, head_dim, dtype, rng)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    found, right = attend(given, lengths, **options), expected(given, lengths, **options)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    assert np.isneginf(found[1].cpu().numpy()[:, sum(lengths) :]).all()
    rounding = 8 * ROUNDING[dtype] + head_dim * 2.0**-24
    for name, got, exact in zip(("out", "lse", "dq", "dk", "dv"), found, right, strict=True):
        got, exact = (x[..., : sum(lengths)] if name == "lse" else x for x in (got.double().cpu().numpy(), exact))
        assert np.abs(got - exact).max() <= rounding * max(1, np.abs(exact).max()), name
        if name != "lse":
            assert not got[sum(lengths) :].any()


def test_a_window_of_one_sees_the_value_itself(rng):
    """Gradients of scores cancel, up to the rounding of the sums that are subtracted."""
    q, k, v, d_out = given = inputs((130, 60), 2, 2, 64, torch.float32, rng)
    out, _, dq, dk, dv = attend(given, (130, 60), scale=0.125, window=1)
    assert torch.equal(out[:190], v[:190])
    assert torch.allclose(dv[:190], d_out[:190], rtol=1e-6, atol=0)
    bound = 64 * 2.0**-24 * 0.125 * (d_out.abs() * v.abs()).sum(2).max()
    assert dq.abs().max() <= bound * k.abs().max()
    assert dk.abs().max() <= bound * q.abs().max()


def test_results_are_the_same_from_run_to_run(rng):
    given = inputs((100, 50), 4, 2, 32, torch.float32, rng)
    first, again = (attend(given, (100, 50), scale=0.2, window=70) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_documents_are_as_they_are_alone(rng):
    given = inputs((90, 0, 45), 2, 1, 16, torch.float32, rng)
    together = attend(given, (90, 0, 45), scale=0.2)
    for own in (slice(0, 90), slice(90, 135)):
        alone = attend([x[own].contiguous() for x in given], (own.stop - own.start,), scale=0.2)
        for got, right in zip((alone[0], *alone[2:]), (together[0], *together[2:]), strict=True):
            assert torch.equal(got, right[own])


def test_nothing_to_attend_to(rng):
    given = inputs((), 2, 1, 16, torch.float32, rng)
    out, lse, *gradients = attend(given, (), scale=1.0)
    assert lse.eq(-torch.inf).all()
    assert not any(x.any() for x in (out, *gradients))


def test_wrong_arguments_are_refused(rng, monkeypatch):
    q, k, v, _ = inputs((6,), 4, 2, 16, torch.float32, rng)
    for match, error, changed in (
        ("all float16, bfloat16 or float32", TypeError, (q.double(), k, v)),
        ("all float16, bfloat16 or float32", TypeError, (q, k.half(), v)),
        ("n_heads a multiple of n_kv_heads", ValueError, (q[:, :3].contiguous(), k, v)),
        ("k and v", ValueError, (q, k[:-1], v)),
        ("contiguous", ValueError, (q.transpose(0, 1).contiguous().transpose(0, 1), k, v)),
    ):
        with pytest.raises(error, match=match):
            flash.flash_forward(*changed, (6,), scale=1.0)
    for lengths in ((9,), (3, -1)):
        with pytest.raises(ValueError, match="lengths must not be negative, nor more than 8 in all"):
            flash.flash_forward(q, k, v, lengths, scale=1.0)
    monkeypatch.setattr(flash, "interpreted", lambda: False)
    with pytest.raises(BackendMissing, match="the tensors are on cpu"):
        flash.flash_forward(q.cpu(), k.cpu(), v.cpu(), (6,), scale=1.0)


COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from barefoot.ops.triton import flash

floats = {"scale": "fp32", "softcap": "fp32"} | dict.fromkeys(("lse", "delta"), "*fp32") | {"tiles": "*i32"}
floats |= dict.fromkeys(("q", "k", "v", "out", "d_out", "dq", "dk", "dv"), "*fp16")
constants = {"SHARING": 3, "DIM": 64, "WIDTH": 64} | dict.fromkeys(("CAPPED", "WINDOWED"), sys.argv[2] == "capped")
constants |= {"TYPE": tl.float16, "BLOCK_Q": 128, "BLOCK_K": 64}
for kernel in (flash._forward, flash._backward_queries, flash._backward_keys):
    given = {n: "constexpr" if n in constants else floats.get(n, "i32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if given[n].startswith("*")}
    source = ASTSource(kernel, given, constants, aligned)
    print(triton.compile(source, GPUTarget("cuda", int(sys.argv[1]), 32), {"num_warps": 4, "num_stages": 2}).asm["ptx"])
    print("=" * 20)
"""


@pytest.mark.parametrize(
    ("architecture", "kind", "instruction"), [(80, "plain", "mma.sync.aligned.m16n8k16"), (90, "capped", "wgmma")]
)
def test_machine_code_multiplies_in_tensor_cores(architecture, kind, instruction):
    """Compiled for processors that need not be here; each kernel multiplies two, three or four times a step."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(architecture), kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = done.stdout.split("=" * 20)[:3]
    assert all(instruction in ptx for ptx in kernels)
    assert not any("atom" in ptx for ptx in kernels)
