"""The Triton kernels against float64 and int64 products: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
pytest.importorskip("triton", reason="the Triton kernels need triton: pip install 'barefoot[gpu]'")

from barefoot.core.errors import BackendMissing, Incompatible  # noqa: E402
from barefoot.ops import PackedWeight, blocks, cases, panels, planes  # noqa: E402
from barefoot.ops.triton import panel_matmul as w_a16  # noqa: E402
from barefoot.ops.triton import plane_matmul as w_a  # noqa: E402
from barefoot.ops.triton import tiles  # noqa: E402
from barefoot.weights.module import PackedLinear  # noqa: E402

DEVICE = "cpu" if tiles.interpreted() else "cuda"  # tests/conftest.py looks which
GROUPED = [name for name in blocks.names() if w_a16.supports(name, 16, blocks.block_elements(name))]
EPS = 2.0**-24
#: Of one number; the interpreter cuts bfloat16 off.
ROUNDING = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if tiles.interpreted() else 2.0**-8,
}


def numbers(shape, dtype, rng):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(DEVICE, dtype)


def as_float64(x):
    return x.double().cpu().numpy()


def packed(name, rows, n_groups, rng):
    """A weight on the device, its float64 values, and what each element's terms come to at most, before signs."""
    cols = n_groups * blocks.block_elements(name)
    raw = cases.random_packed(name, rows, cols, rng)
    weight = w_a16.PanelWeight.of(PackedWeight(name, rows, cols, raw.reshape(-1)), DEVICE)
    values = blocks.decode(name, raw, cols).astype(np.float64)
    anatomy = blocks.lookup(name).group
    header = raw.reshape(rows, n_groups, -1)[..., : anatomy.header_bytes].copy().view(np.float16).astype(np.float64)
    largest = np.abs(header[..., 0]) * 2**anatomy.bits + (np.abs(header[..., 1]) if anatomy.has_minimum else 0)
    return weight, values, np.repeat(largest, cols // n_groups, axis=1)


def within(got, x, values, largest, n_groups, dtype):
    """Whether errors are those of float32 sums (products of one group, then a few operations a group), and of ``got``.

    The sum of n products errs by at most n roundings of the sum of their magnitudes.
    """
    exact = as_float64(x) @ values.T
    terms = x.shape[1] // n_groups + 4 * n_groups
    bound = terms * EPS * (np.abs(as_float64(x)) @ largest.T) + ROUNDING[dtype] * np.abs(exact)
    return (np.abs(as_float64(got) - exact) <= bound).all()


# --- W4A16, W2A16 and the others ---


@pytest.mark.parametrize("name", GROUPED)
def test_every_format_of_one_scale_a_group(name, rng):
    for rows, n_groups, n_tokens in ((16, 1, 1), (48, 3, 5), (32, 2, 19)):
        weight, values, largest = packed(name, rows, n_groups, rng)
        x = numbers((n_tokens, weight.cols), torch.float32, rng)
        assert within(w_a16.panel_matmul(x, weight), x, values, largest, n_groups, torch.float32)


def test_which_formats_those_are():
    assert {f"int{bits}_g{group}_{kind}" for bits in (2, 4) for group in (32, 64, 128) for kind in ("sym", "asym")} < {
        *GROUPED
    }
    assert not {"f16", "q4_k", "q6_k", "tq2_0", "tq1_0"} & {*GROUPED}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4_g64_sym", "int4_g128_asym", "int2_g64_asym", "int3_g32_asym", "q8_0"])
def test_half_precision_does_not_round_weights(name, dtype, rng):
    weight, values, largest = packed(name, 32, 4, rng)
    x = numbers((3, weight.cols), dtype, rng)
    got = w_a16.panel_matmul(x, weight)
    assert got.dtype == dtype
    assert within(got, x, values, largest, 4, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoding_to_half_precision_would(dtype, rng):
    """Differences of two weights of one group: minimums cancel, and what is left are whole numbers.

    The cheap way, decoding to the dtype and multiplying, has rounded the two weights differently.
    """
    codes = rng.integers(0, 16, (16, 128), dtype=np.uint8)
    raw = blocks.pack("int4_g128_asym", codes, np.tile(np.float32([1, 1331 / 1024]), (16, 1)))
    weight = PackedWeight("int4_g128_asym", 16, 128, raw.reshape(-1))
    x = torch.zeros((4, 128), dtype=dtype, device=DEVICE)
    x[range(4), range(4)], x[range(4), range(70, 74)] = 1, -1
    exact = codes[:, :4].T.astype(int) - codes[:, 70:74].T
    got = as_float64(w_a16.panel_matmul(x, w_a16.PanelWeight.of(weight, DEVICE)))
    assert np.array_equal(got, exact)
    imitation = as_float64(x.cpu() @ torch.from_numpy(blocks.decode("int4_g128_asym", raw, 128)).to(dtype).T)
    assert (imitation != exact).mean() > 0.1


@pytest.mark.parametrize("name", ["int4_g32_asym", "int2_g64_sym"])
def test_few_tokens_share_rows_among_programs(name, rng):
    assert tiles.n_splits(1, 16, 8) == 2
    assert tiles.n_splits(17, 16, 64) == tiles.n_splits(1, 1 << 14, 64) == tiles.n_splits(1, 16, 7) == 1
    for n_groups in (8, 19):  # 19 groups: runs of 5, 5, 5 and 4
        weight, values, largest = packed(name, 16, n_groups, rng)
        x = numbers((2, weight.cols), torch.float32, rng)
        got = w_a16.panel_matmul(x, weight)
        assert within(got, x, values, largest, n_groups, torch.float32)
        assert torch.equal(got, w_a16.panel_matmul(x, weight))


@pytest.mark.parametrize("tile", tiles.TILES)
def test_every_tile_computes_the_same(tile, rng, monkeypatch):
    tokens, rows, stages, warps = tile
    config = tiles.configuration(tokens, rows, stages, warps)
    for kernel in (w_a16._tuned_kernel, w_a._tuned_kernel):
        monkeypatch.setattr(kernel, "configs", [config])
    weight, values, largest = packed("int3_g64_asym", 80, 2, rng)
    x = numbers((21, weight.cols), torch.float32, rng)
    assert within(w_a16.panel_matmul(x, weight), x, values, largest, 2, torch.float32)
    of_planes, codes = whole_planes(3, 64, 75, 170, rng)
    y = odd_integers(21, 170, 5, 64, rng)
    assert np.array_equal(plane_product(y, of_planes, 5), y.astype(np.int64) @ planes.values(codes, 3).T)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, which computes with numpy
def test_a_token_with_nan_or_infinity(bad, rng):
    weight, *_ = packed("int4_g64_asym", 16, 2, rng)
    of_planes, _ = whole_planes(2, 64, 16, 128, rng)
    x = numbers((5, 128), torch.float32, rng)
    for product in (lambda: w_a16.panel_matmul(x, weight), lambda: w_a.plane_matmul(x, of_planes, 4)):
        x[3, 77] = 0.5
        clean = product()
        x[3, 77] = bad
        got = product()
        assert not torch.isfinite(got[3]).any()
        kept = [0, 1, 2, 4]
        assert torch.equal(got[kept], clean[kept])


# --- planes ---


def odd_integers(n_tokens, cols, bits, group, rng):
    """Values that ``bits`` bits hold exactly: odd integers, the largest of which occurs in every group."""
    levels = (1 << bits) - 1
    x = 2 * rng.integers(0, levels + 1, (n_tokens, cols)) - levels
    x[:, ::group] = levels * rng.choice([-1, 1], x[:, ::group].shape)
    return x.astype(np.float32)


def whole_planes(bits, group, rows, cols, rng):
    """Steps of 2: weights are odd integers. The weight on the device, and its codes."""
    fmt = planes.PlaneFormat.bipolar(bits, group)
    codes = rng.integers(0, fmt.levels + 1, (rows, cols), dtype=np.uint8)
    weight = planes.pack(fmt, codes, np.full((rows, fmt.n_groups(cols)), 2, np.float16))
    return w_a.DevicePlanes.of(weight, DEVICE), codes


def plane_product(x, weight, bits):
    return as_float64(w_a.plane_matmul(torch.from_numpy(x).to(DEVICE), weight, bits))


@pytest.mark.parametrize("weight_bits", range(1, 9))
def test_every_pair_of_bits_is_exact(weight_bits, rng):
    for bits in range(1, 9):
        group = int(rng.choice([32, 64, 96, 128, 512]))
        rows, cols, n_tokens = (int(rng.integers(1, most)) for most in (40, 300, 18))
        weight, codes = whole_planes(weight_bits, group, rows, cols, rng)
        x = odd_integers(n_tokens, cols, bits, group, rng)
        exact = x.astype(np.int64) @ planes.values(codes, weight_bits).T
        assert np.abs(exact).max() < 2**24
        assert np.array_equal(plane_product(x, weight, bits), exact)


@pytest.mark.parametrize("name", ["int2_g64_sym", "ternary_g64", "int3_g64_asym", "int4_g32_asym", "int8_g128_sym"])
def test_integer_groups_as_planes(name, rng):
    """x is exact in 5 bits, so the only rounding is that of float32 sums: a few a group."""
    size = blocks.block_elements(name)
    raw = cases.random_packed(name, 24, 5 * size, rng)
    weight = planes.from_blocks(name, raw, 5 * size)
    values = blocks.decode(name, raw, 5 * size).astype(np.float64)
    x = np.float32(0.25) * odd_integers(5, 5 * size, 5, size, rng)
    got = plane_product(x, w_a.DevicePlanes.of(weight, DEVICE), 5)
    _, steps, minimums = planes.unpack(weight)
    largest = np.abs(steps.astype(np.float64)) * 2**weight.format.bits + (0 if minimums is None else np.abs(minimums))
    bound = (size // 2 + 4 * 5) * EPS * (np.abs(x).astype(np.float64) @ np.repeat(largest, size, axis=1).T)
    assert (np.abs(got - x.astype(np.float64) @ values.T) <= bound).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_activations_are_rounded_as_the_reference_rounds_them(bits, rng):
    x = rng.standard_normal((3, 300)).astype(np.float32)
    x[1, :128] = 1e-31  # below 2^-100: counts as zero
    codes, scales, sums = planes.quantize_activations(x, bits, 128)
    found = w_a.quantize_activations(torch.from_numpy(x).to(DEVICE), bits, 128)
    values = found[0].cpu().numpy().astype(np.int64)
    whole = values[0] if bits < 8 else 16 * values[0] + values[1]
    # Where x lies within rounding of the border of two codes, a GPU's fused multiply-add may choose the other one.
    s = np.repeat(scales, 128, axis=1)[:, :300]
    ratio = np.divide(x, 2 * s, out=np.full_like(x, 0.5), where=s > 0)
    clear = np.abs(ratio - np.rint(ratio)) > 2.0 ** (bits - 22)
    assert clear.mean() > 0.99
    assert np.array_equal(whole[clear], planes.values(codes, bits)[clear])
    assert np.allclose(found[1].t().cpu().numpy(), scales, rtol=2 * EPS, atol=0)
    assert np.allclose(found[2].t().cpu().numpy(), sums, rtol=0, atol=128 * EPS * np.abs(x).sum(axis=1).max())


def test_many_tokens_and_runs_of_groups(rng):
    weight, codes = whole_planes(2, 32, 20, 32 * 19 + 7, rng)  # 20 groups, the last one of 7 columns
    assert tiles.n_splits(3, 20, 20) == 4
    for n_tokens in (3, 17):
        x = odd_integers(n_tokens, weight.cols, 3, 32, rng)
        assert np.array_equal(plane_product(x, weight, 3), x.astype(np.int64) @ planes.values(codes, 2).T)


# --- in a model ---


@pytest.mark.parametrize("name", ["int4_g64_asym", "int2_g64_sym"])
def test_a_linear_layer_multiplies_by_the_kernels(name, rng, monkeypatch):
    layer = PackedLinear(name, 128, 48, device=DEVICE)
    layer.pack(torch.from_numpy(rng.standard_normal((48, 128)).astype(np.float32)))
    rows, dense = layer.weight.clone(), layer.dense()
    x = numbers((2, 3, 128), torch.float32, rng).requires_grad_()
    assert layer.arrange()
    assert layer.weight.shape == rows.shape
    assert not torch.equal(layer.weight, rows)
    assert torch.equal(layer.dense(5, 37), dense[5:37])
    with monkeypatch.context() as patch:
        patch.setattr(PackedLinear, "dense", None)  # nothing is decoded
        y = layer(x)
    bound = 128 * EPS * (x.abs() @ dense.abs().T) * 2**4  # whole numbers of up to 4 bits, before their scale
    assert ((y - x @ dense.T).abs() <= bound).all()
    y.backward(torch.ones_like(y))
    assert torch.allclose(x.grad, dense.sum(0).expand_as(x), atol=48 * EPS * dense.abs().sum(0).max().item())
    kept = layer.state_dict()
    assert torch.equal(kept["weight"], rows)
    again = PackedLinear(name, 128, 48, device=DEVICE)
    again.arrange()
    again.load_state_dict(kept)
    assert torch.equal(again.weight, rows)
    assert torch.equal(again(x.detach().double()), x.detach().double() @ dense.double().T)  # not the kernels'


def test_layers_that_the_kernels_do_not_take(rng):
    for name, rows in (("q4_k", 16), ("int4_g64_sym", 18)):
        layer = PackedLinear(name, 256, rows, device=DEVICE)
        assert not layer.arrange()


# --- memory and arguments ---


def test_a_weight_takes_the_bytes_of_its_format(rng):
    weight, *_ = packed("int4_g128_asym", 48, 3, rng)
    assert weight.buffer.nbytes == 48 * 3 * (4 + 128 // 2)
    raw = cases.random_packed("int4_g128_asym", 16, 128, rng)
    one_panel = panels.pack("int4_g128_asym", raw, 128).reshape(-1)
    as_panels = PackedWeight("int4_g128_asym", 16, 128, one_panel, layout="panels")
    assert np.array_equal(w_a16.PanelWeight.of(as_panels, DEVICE).buffer.cpu().numpy(), one_panel)
    of_planes, _ = whole_planes(2, 64, 32, 128, rng)
    assert of_planes.buffer.nbytes == 32 * (128 * 2 // 8 + 2 * 2)


def test_wrong_arguments_are_refused(rng):
    weight, *_ = packed("int4_g32_sym", 16, 2, rng)
    of_planes, _ = whole_planes(2, 32, 18, 64, rng)
    x = numbers((2, 64), torch.float16, rng)
    for product in (lambda x: w_a16.panel_matmul(x, weight), lambda x: w_a.plane_matmul(x, of_planes, 2)):
        with pytest.raises(ValueError, match=r"contiguous \(n_tokens, 64\), got \(2, 63\)"):
            product(x[:, :63])
        with pytest.raises(ValueError, match=r"got \(64, 2\)"):
            product(x.t())
        with pytest.raises(ValueError, match=r"got \(0, 64\)"):
            product(x[:0])
        with pytest.raises(TypeError, match=r"float16, bfloat16 or float32, got torch\.float64"):
            product(x.double())
        with pytest.raises(ValueError, match="x is on meta, the weight on"):
            product(x.to("meta"))
    with pytest.raises(ValueError, match="1 to 8 bits, got 9"):
        w_a.plane_matmul(x, of_planes, 9)
    with pytest.raises(ValueError, match=r"planes \[18, 64\] need 640 contiguous uint8, got 639 of torch.uint8"):
        w_a.DevicePlanes(of_planes.format, 18, 64, of_planes.buffer[:-1])
    with pytest.raises(ValueError, match=r"int4_g32_sym \[16, 64\] need 576 contiguous uint8, got 575"):
        w_a16.PanelWeight("int4_g32_sym", 16, 64, weight.buffer[:-1])
    for name, rows in (("int4_g32_sym", 18), ("q4_k", 16), ("f16", 16)):
        with pytest.raises(Incompatible, match=rf"{name} \[{rows}, 256\] has no product here"):
            w_a16.PanelWeight(name, rows, 256, weight.buffer)


def test_the_cpu_needs_the_interpreter(rng, monkeypatch):
    weight, *_ = packed("int4_g32_sym", 16, 1, rng)
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    on_cpu = w_a16.PanelWeight(weight.format, 16, 32, weight.buffer.cpu())
    with pytest.raises(BackendMissing, match="computes on a CUDA device, the tensors are on cpu"):
        w_a16.panel_matmul(torch.zeros(1, 32), on_cpu)


# --- machine code ---

COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from barefoot.ops.triton import panel_matmul, plane_matmul

def code(kernel, types, constants, architecture):
    given = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in (*types, "n_rows", "n_cols")}
    source = ASTSource(kernel, given, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": 4}).asm["ptx"]

tile = {"BLOCK_TOKENS": int(sys.argv[2]), "BLOCK_ROWS": 64, "STAGES": 3, "FEW": sys.argv[2] == "16"}
floats = {"x": "*fp16", "sums": "*fp32", "words": "*i32", "out": "*fp16"}
four = {"GROUP": 128, "BITS": 4, "LOW_BITS": 4, "HAS_MINIMUM": True, "ZERO": 0, "TYPE": tl.float16}
whole = {"values": "*i8", "scales": "*fp32", "sums": "*fp32", "words": "*i32", "out": "*fp16"}
two = {"W_BITS": 2, "X_BITS": 2, "GROUP_WORDS": 4, "WORDS": 4, "HAS_MINIMUM": False, "OFFSET": 0.0}
print(code(panel_matmul._kernel, floats, tile | four, int(sys.argv[1])))
print("=" * 20)
print(code(plane_matmul._kernel, whole, tile | two, int(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("architecture", "tokens", "of_floats", "of_integers"),
    [
        (80, 16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
        (90, 64, "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16", "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8"),
    ],
)
def test_machine_code_multiplies_in_tensor_cores_and_copies_ahead(architecture, tokens, of_floats, of_integers):
    """Compiled for processors that need not be here; the interpreter's flag would leave nothing to compile."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", COMPILE, str(architecture), str(tokens)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    floats, integers = done.stdout.split("=" * 20)
    assert of_floats in floats
    assert of_integers in integers
    for ptx in (floats, integers):
        assert ptx.count("cp.async.") >= 8  # of codes, headers and activations, before and in the loop
        assert "ld.global" not in ptx  # nothing is waited for in the loop
