"""The PyTorch modules of packed matrices against dense ones of the same values, and their bytes against storages."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot.core.errors import InvalidInput
from barefoot.ops import blocks, parts
from barefoot.weights.solvers import Inputs
from barefoot.weights.structures.bitstack import BitStack

torch = pytest.importorskip("torch", reason="the modules are PyTorch's")

from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from barefoot.weights import module  # noqa: E402
from barefoot.weights.module import PackedEmbedding, PackedLinear  # noqa: E402

FORMATS = (
    "f32",
    "bf16",
    "q4_1",
    "q8_0",
    "int4_g64_sym",
    "int3_g64_asym",
    "int2_g64_asym",
    "ternary_g64",
    "int1_g64_asym",
)


def packed(format: str, cols: int, rows: int, **settings) -> PackedLinear:
    layer = PackedLinear(format, cols, rows, **settings)
    layer.pack(torch.from_numpy(np.random.default_rng(rows).standard_normal((rows, cols), np.float32)))
    return layer


def storages(layer: torch.nn.Module) -> int:
    """Bytes of all distinct storages below a module."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tile_rows", [1, 5, 1000])
def test_products_and_gradients_are_those_of_the_decoded_matrix(format, tile_rows, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 4 * 128 * tile_rows)
    layer = packed(format, 128, 33)
    weight = torch.from_numpy(blocks.decode(format, layer.weight.numpy(), 128))
    x = torch.randn(2, 7, 128, requires_grad=True)
    grad = torch.randn(2, 7, 33)
    y = layer(x)
    y.backward(grad)
    # Sums of 128 and of 33 float32 products, in another order: n × 2^-24 of the sum of magnitudes.
    assert ((y - x @ weight.T).abs() <= 128 * 2**-24 * (x.abs() @ weight.abs().T)).all()
    assert ((x.grad - grad @ weight).abs() <= 33 * 2**-24 * (grad.abs() @ weight.abs())).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (33, 192), (48, 128)])
def test_bytes_are_the_storages(format, rows, cols):
    layer = packed(format, cols, rows)
    assert storages(layer) == layer.n_bytes == rows * blocks.row_bytes(format, cols)
    assert storages(packed(format, cols, rows, bias=True)) == layer.n_bytes + 4 * rows
    assert storages(PackedEmbedding(format, rows, cols)) == layer.n_bytes


class Storages(TorchDispatchMode):
    """Every storage that an operation reads or writes, to see which of them live on."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def live_bytes(self) -> int:
        return sum(n_bytes for ref, n_bytes in self.seen.items() if not ref.expired())


def test_nothing_decoded_is_kept_for_the_backward_pass(monkeypatch):
    """Of two matrices one tile stays, in the scratch that all share."""
    monkeypatch.setattr(module, "_shared", module._Scratch())
    layer, other = (packed("int4_g64_sym", 128, 512) for _ in range(2))
    x = torch.randn(3, 128, requires_grad=True)
    with Storages() as mine:
        y, z = layer(x), other(x)
    assert mine.live_bytes() <= 2 * layer.n_bytes + 4 * (x.numel() + y.numel() + z.numel()) + 4 * 512 * 128
    weight = layer.dense().requires_grad_()
    with Storages() as plain:
        z = x @ weight.T
    assert plain.live_bytes() == 4 * (x.numel() + weight.numel() + z.numel())  # the instrument sees a dense matrix


def test_state_dicts_carry_the_bytes(tmp_path):
    layer = packed("int3_g64_asym", 128, 20, bias=True)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = PackedLinear("int3_g64_asym", 128, 20, bias=True)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.randn(4, 128)
    assert layer.state_dict()["weight"].dtype == torch.uint8
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PackedLinear("int4_g64_asym", 128, 20, bias=True).load_state_dict(layer.state_dict())


def test_casting_a_model_leaves_the_bytes_alone_and_products_take_the_inputs_type():
    layer = packed("int4_g64_sym", 128, 20)
    exact, before = layer(torch.ones(1, 128)), layer.weight.clone()
    half = layer.to(torch.bfloat16)(torch.ones(1, 128, dtype=torch.bfloat16))
    assert torch.equal(layer.weight, before)
    assert half.dtype == torch.bfloat16
    # Weights and result are rounded to 8 bits each; 128 ones don't round.
    assert ((half.float() - exact).abs() <= 2**-8 * (layer.dense().abs().sum(1) + exact.abs())).all()


def test_an_embedding_looks_rows_up_and_shares_its_bytes_with_a_head():
    rows = PackedEmbedding("q8_0", 50, 64, scale=8.0)
    rows.pack(torch.randn(50, 64))
    head = PackedLinear("q8_0", 64, 50, device="meta")
    head.weight = rows.weight
    ids = torch.tensor([[3, 49, 0], [7, 7, 1]])
    assert torch.equal(rows(ids), 8 * rows.dense()[ids])
    assert storages(torch.nn.ModuleList([rows, head])) == rows.n_bytes


def test_parts_are_added_and_stored_beside_the_blocks():
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((33, 128), np.float32))
    matrix = BitStack(blocks=3, rank=2).solve(weight.numpy(), Inputs(np.ones(128, np.float32)))
    assert len(matrix.parts) == 3
    sizes = {label: (kind, data.size) for label, (kind, data) in matrix.parts.items()}
    layer = PackedLinear(matrix.format, 128, 33, added=sizes)
    layer.hold(matrix)
    expected = sum(torch.from_numpy(parts.lookup(k).decode(33, 128, data)) for k, data in matrix.parts.values())
    x, grad = torch.randn(5, 128, requires_grad=True), torch.randn(5, 33)
    y = layer(x)
    y.backward(grad)
    assert ((y - x @ expected.T).abs() <= 128 * 2**-24 * (x.abs() @ expected.abs().T)).all()
    assert ((x.grad - grad @ expected).abs() <= 33 * 2**-24 * (grad.abs() @ expected.abs())).all()
    assert storages(layer) == layer.n_bytes == matrix.n_bytes
    assert set(layer.state_dict()) == {"weight"} | {f"weight+{label}" for label in matrix.parts}
    other = PackedLinear(matrix.format, 128, 33, added=sizes)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    with pytest.raises(InvalidInput, match="format, shape and parts"):
        PackedLinear(matrix.format, 128, 33).hold(matrix)


def test_shapes_are_checked_and_shown():
    layer = PackedLinear("int4_g64_sym", 128, 20)
    with pytest.raises(InvalidInput, match=r"\(20, 128\), got \(128, 20\)"):
        layer.pack(torch.zeros(128, 20))
    assert str(20 * 2 * (2 + 32)) in repr(layer)
    assert "int4_g64_sym" in repr(layer)
