"""Solvers that refine a whole layer: gradients, where they begin, what they gain, and that both streams are needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from random_layers import SPECS, random_layer

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.engine.layer_pass import LayerPass, rotations
from barefoot.ops import blocks
from barefoot.ops.grids import Grid, Shifted, Table, Ternary, Uniform
from barefoot.weights.folds import Heads
from barefoot.weights.solvers import LayerProblem
from barefoot.weights.solvers.omniquant import Clipped, OmniQuant, first_factors
from barefoot.weights.solvers.qat import Qat
from barefoot.weights.solvers.range import Range

torch = pytest.importorskip("torch", reason="layer solvers learn with PyTorch")

from barefoot.weights.training.blockwise import Schedule  # noqa: E402
from barefoot.weights.training.grids import Levels  # noqa: E402
from barefoot.weights.training.layer import exact_outputs, layer_function, per_token  # noqa: E402

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
GRIDS = {
    "uniform": Uniform(2, 16),
    "symmetric": Uniform(3, 16, symmetric=True),
    "table": Table((-1.0, -0.4, 0.0, 0.3, 1.0), 16),
    "codes not in order": Table((0.0, 0.5, 1.5, 0.0, -0.5, -1.5), 16),
    "ternary": Ternary(16),
}


def problem(name="llama", layer=0, grid: Grid = GRIDS["uniform"], n_windows=16, n=24, noise=0.3, roles=MATRICES):
    """A random layer whose quantized stream is the exact one with noise."""
    case, rng = random_layer(name, layer), np.random.default_rng(7)
    spec = case.spec
    exact = rng.standard_normal((n_windows, n, spec.d_model)).astype(np.float32)
    there = LayerPass(spec, layer, {r: w for r, w in case.weights.items() if w.ndim == 1})
    grids = dict.fromkeys(roles, grid)
    return LayerProblem(
        spec=spec,
        layer=layer,
        weights=case.weights,
        grids=grids,
        starts={role: Range().solve(case.weights[role], grid, None) for role in roles},
        inputs=exact + np.float32(noise) * rng.standard_normal(exact.shape).astype(np.float32),
        targets=np.stack([there(x, case.weights) for x in exact]),
        rotations=rotations(spec, layer, n),
    )


def error(p: LayerProblem, matrices, vectors=None) -> float:
    """Of a solution, by the engine's own pass: mean squared distance from the targets."""
    layer = {**p.weights, **{role: s.weights(p.grids[role]) for role, s in matrices.items()}, **(vectors or {})}
    there = LayerPass(p.spec, p.layer, {r: w for r, w in layer.items() if w.ndim == 1})
    return float(np.mean([np.square(there(x, layer) - y).mean() for x, y in zip(p.inputs, p.targets, strict=True)]))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_rounded_weights_and_their_gradients(grid):
    """Values are those of the numpy grid; gradients those of the equations, computed here group by group."""
    rng, levels = np.random.default_rng(1), Levels.of(grid)
    x = rng.standard_normal((37, grid.group)).astype(np.float32)
    params = grid.plain(x) * np.float32(0.7)  # so that some weights are clipped
    params = params.astype(np.float16).astype(np.float32)
    w = torch.from_numpy(x).requires_grad_()
    s = torch.from_numpy(params[:, :1].copy()).requires_grad_()
    m = torch.from_numpy(params[:, 1:].copy() if levels.has_minimum else np.zeros_like(params)).requires_grad_()
    out = levels.rounded(w, s, m)
    assert np.array_equal(out.detach().numpy(), grid.values(grid.round(x, params), params))
    solution = levels.solution(w, s, m, x.shape)
    assert np.array_equal(solution.codes, grid.round(x, params))
    assert np.array_equal(solution.params.reshape(params.shape), params)

    grad = rng.standard_normal(x.shape).astype(np.float32)
    out.backward(torch.from_numpy(grad))
    scale, minimum = s.detach().numpy(), m.detach().numpy()
    u = (x - minimum) / scale
    level = (grid.values(grid.round(x, params), params) - minimum) / scale
    ends = np.asarray(levels.values, np.float32)
    inside = (u >= ends[0] - (ends[1] - ends[0]) / 2) & (u <= ends[-1] + (ends[-1] - ends[-2]) / 2)
    assert 0.02 < 1 - inside.mean() < 0.5
    np.testing.assert_allclose(w.grad.numpy(), grad * inside, rtol=1e-6)
    to_s = (grad * np.where(inside, level - u, level)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(s.grad.numpy(), to_s, rtol=1e-4, atol=1e-5)
    if levels.has_minimum:
        np.testing.assert_allclose(m.grad.numpy(), (grad * ~inside).sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-5)


def test_a_grid_without_levels_is_refused():
    with pytest.raises(Incompatible, match="no levels to learn on"):
        Levels.of(object())
    with pytest.raises(Incompatible, match="Shifted has no levels to learn on"):
        Levels.of(Shifted(4, 32))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_qat_begins_at_its_start(grid):
    """Without rates nothing moves, and the codes are those of the start, though weights lie elsewhere."""
    p = problem(grid=grid)
    rng = np.random.default_rng(2)
    moved = {  # a start that is not plain rounding: some codes one off
        role: replace(s, codes=np.clip(s.codes.astype(int) + rng.integers(-1, 2, s.codes.shape), 0, 2).astype(np.uint8))
        for role, s in p.starts.items()
    }
    p = replace(p, starts=moved)
    found = Qat(epochs=1, rate=0, scale_rate=0, start="range").refine(p)
    for role, start in moved.items():
        assert np.array_equal(found.matrices[role].params, start.params), role
        assert np.array_equal(found.matrices[role].codes, start.codes), role


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "qwen2", "phi3-partial", "llama-interleaved"])
def test_a_refined_layer_is_nearer_to_its_targets(name):
    p = problem(name)
    at_first = error(p, p.starts)
    qat = Qat(start="range", epochs=8, rate=0.01, scale_rate=0.005, precision="float32").refine(p)
    assert qat.vectors == {}
    assert error(p, qat.matrices) < 0.75 * at_first
    assert qat.errors[1] < qat.errors[0]
    settings = {"epochs": 8, "rate": 0.05, "transform_rate": 0.02, "batch": 4, "precision": "float32"}
    clipped = OmniQuant(**settings).refine(p)
    assert clipped.vectors == {}
    assert error(p, clipped.matrices) < 0.98 * at_first
    whole = OmniQuant(transform=True, **settings).refine(p)
    assert whole.vectors.keys() >= {"attn_norm", "ffn_norm"}
    assert error(p, whole.matrices, whole.vectors) < 0.98 * at_first


def test_the_same_seed_gives_the_same_codes():
    p, solver = problem(), Qat(start="range", epochs=2, rate=0.01)
    first, second = solver.refine(p), solver.refine(p)
    other = replace(solver, seed=1).refine(p)
    assert all(np.array_equal(first.matrices[r].codes, second.matrices[r].codes) for r in MATRICES)
    assert any(not np.array_equal(first.matrices[r].codes, other.matrices[r].codes) for r in MATRICES)


def test_matrices_without_a_grid_stay_and_no_fold_passes_through_them():
    p = problem(roles=("v", "o", "gate"))
    found = OmniQuant(epochs=1, transform=True).refine(p)
    assert found.matrices.keys() == {"v", "o", "gate"}
    assert found.vectors == {}  # factors of v lie in v and o; gate has up beside it, which can't change


def test_what_is_worse_on_the_windows_held_out_is_not_kept():
    p = problem()
    wild = Qat(start="range", epochs=1, rate=50.0, scale_rate=5.0).refine(p)
    assert wild.errors[1] > wild.errors[0]
    assert all(np.array_equal(wild.matrices[r].codes, p.starts[r].codes) for r in MATRICES)


def test_factors_even_out_channels_for_rounded_activations():
    """Channels of the norm that are 50 times the others' ruin 6-bit activations; factors bring them down."""
    p = problem(grid=Uniform(8, 16), noise=0.0)
    norm = p.weights["attn_norm"].copy()
    norm[:3] *= 50
    columns = np.where(np.arange(norm.size) < 3, np.float32(1 / 50), np.float32(1))
    planted = {**p.weights, "attn_norm": norm, **{r: p.weights[r] * columns for r in "qkv"}}
    p = replace(p, weights=planted, starts={r: Range().solve(planted[r], p.grids[r], None) for r in MATRICES})

    def rounded_error(matrices, vectors) -> float:
        layer = {**planted, **{r: s.weights(p.grids[r]) for r, s in matrices.items()}, **vectors}
        out = exact_outputs(replace(p, weights=layer), layer_function(p, rounding=per_token(6)))
        return float(np.square(out - p.targets).mean())

    found = OmniQuant(epochs=4, transform=True, activation_bits=6, batch=4, precision="float32").refine(p)
    assert rounded_error(found.matrices, found.vectors) < 0.5 * rounded_error(p.starts, {})
    assert np.abs(found.vectors["attn_norm"]).max() < 0.5 * np.abs(norm).max()


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "qwen2", "phi3-partial", "llama-interleaved"])
def test_factors_leave_the_function_alone(name):
    """Whatever they are: all folds together, without rounding, by the engine's own pass."""
    p = problem(name, grid=Uniform(8, 8))
    student = Clipped(p, OmniQuant(transform=True))
    torch.manual_seed(0)
    with torch.no_grad():
        for logs, _ in student.groups()[1:]:
            for each in logs:
                each.add_(torch.randn_like(each))
        layer = {role: np.ascontiguousarray(w.numpy()) for role, w in student.transformed().items()}
    assert all(not np.allclose(layer[role], p.weights[role]) for role in (*"qkv", "o", "gate", "up"))
    there = LayerPass(p.spec, p.layer, {r: w for r, w in layer.items() if w.ndim == 1})
    expected = exact_outputs(p)
    found = np.stack([there(x, layer) for x in p.inputs])
    assert np.abs(found - expected).max() < 1e-3  # the bound that is stated for LET: logits within 1e-3 of these


def test_training_without_the_quantized_stream_undoes_less():
    """The cheap imitation: exact inputs while learning. Teeth: it must lose on the stream that the model will have."""
    p = problem(noise=0.5)
    exact = np.random.default_rng(7).standard_normal(p.inputs.shape).astype(np.float32)
    there = LayerPass(p.spec, p.layer, {r: w for r, w in p.weights.items() if w.ndim == 1})
    np.testing.assert_allclose(np.stack([there(x, p.weights) for x in exact]), p.targets, atol=1e-6)
    solver = Qat(start="range", epochs=8, rate=0.01, scale_rate=0.005)
    with_stream, without = solver.refine(p), solver.refine(replace(p, inputs=exact))
    assert error(p, with_stream.matrices) < 0.95 * error(p, without.matrices)


def test_the_schedule_holds_out_every_eighth_window():
    schedule = Schedule(epochs=3, batch=4)
    trained, judged = schedule.split(20)
    assert judged == [7, 15]
    assert sorted(trained + judged) == list(range(20))
    assert schedule.n_steps(20) == 3 * 5
    assert schedule.split(3) == ([0, 1, 2], [0, 1, 2])
    assert (schedule.rate(0, 10), schedule.rate(10, 10)) == (1.0, pytest.approx(0.05))


def test_steps_are_reported():
    seen = []
    Qat(start="range", epochs=2, batch=5).refine(problem(), lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 6) for i in range(6)]


@pytest.mark.parametrize(
    "text", ["qat(start=qat)", "qat(epochs=0)", "qat(margin=0.5)", "qat(precision=int8)", "omniquant(alpha=2.0)"]
)
def test_settings_out_of_range_are_refused(text):
    with pytest.raises(InvalidInput):
        parse_composition(text, techniques("weights.solvers"), "weights.solvers")


def test_factors_of_a_fold_have_one_for_what_must_share_it():
    p = problem("llama-gqa-9-3", roles=("q", "k", "v", "o", "gate", "up"), grid=Uniform(4, 8))
    heads = Heads.of(SPECS["llama-gqa-9-3"], 0)
    shapes = {site: tuple(t.shape) for site, t in first_factors(p, 0.5).items()}
    d = p.spec.d_model
    assert shapes == {"attn_norm": (d,), "ffn_norm": (d,), "v": (3, 8), "q": (3, heads.n_free)}


def test_unpacking_is_the_inverse_of_packing():
    weight = np.random.default_rng(5).standard_normal((6, 128)).astype(np.float32)
    for layout in ("int2_g64_asym", "int3_g128_sym", "ternary_g64", "q4_1", "q8_0"):
        rows = blocks.encode(layout, weight)
        codes, params = blocks.unpack(layout, rows)
        assert codes.shape == weight.shape
        assert np.array_equal(blocks.pack(layout, codes, params), rows)
        grid = blocks.lookup(layout).grid
        values = grid.values(codes.reshape(-1, grid.group), params.reshape(-1, params.shape[-1]))
        assert np.array_equal(values.reshape(weight.shape), blocks.decode(layout, rows, 128))
