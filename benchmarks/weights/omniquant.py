"""Learning how a layer is rounded: OmniQuant and layer-wise training beside rounding, GPTQ and cheap imitations.

    python -m benchmarks weights.omniquant MODEL --calibration FILE --text FILE [--only CASE ...] [--windows 32]

MODEL is a dithered GGUF file, whose weights privilege no grid. All matrices of the layers are fitted, the embedding
stays as it is; every contender sees the same windows of the calibration text, and is scored on the second halves of
windows of the other text, in float32. Cases A4 and A6 round activations to so many bits, each token by itself, as
OmniQuant simulates it: nothing here runs in 4 bits.

Imitations: ``mse(weighted=true)`` searches the clipping of each group on a grid and learns nothing; "exact inputs"
learns the same parameters with the same steps, but from hidden states that nothing rounded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from barefoot.core.model import ModelSpec
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.layer_pass import rotations
from barefoot.engine.source import Source, factors
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import Divergence
from barefoot.evals.scoring import text_windows
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.weights.solvers import LayerProblem, LayerSolution, Solver, Steps
from barefoot.weights.solvers.gptq import Gptq
from barefoot.weights.solvers.mse import Mse
from barefoot.weights.solvers.omniquant import OmniQuant
from barefoot.weights.solvers.qat import Qat
from barefoot.weights.solvers.range import Range
from barefoot.weights.training.layer import LayerFunction, Rounding, per_token, unchanged
from benchmarks.harness import card, claim, save

CALIBRATION_WINDOW, WINDOW = 256, 512
# The paper takes 20 epochs of single windows at a rate of 0.01; here a few larger steps go as far in less time.
LEARNED = {"epochs": 5, "batch": 4, "rate": 0.4, "transform_rate": 0.02}
Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ExactInputs(OmniQuant):
    """The imitation: a layer learns on what it would have seen if nothing before it were rounded."""

    seen = {}  # noqa: RUF012 - layer → its exact inputs, which are the targets of the layer before

    def refine(self, problem: LayerProblem, steps: Steps | None = None) -> LayerSolution:
        exact = self.seen.get(problem.layer, problem.inputs)
        self.seen[problem.layer + 1] = problem.targets.copy()
        return super().refine(replace(problem, inputs=exact), steps)


#: case → layout, bits of the activations, contenders
CASES: dict[str, tuple[str, int, dict[str, Solver]]] = {
    "W2A16g64": (
        "int2_g64_asym",
        32,
        {
            "rtn": Range(),
            "gptq": Gptq(),
            "imitation: searched": Mse(weighted=True),
            "imitation: exact inputs": ExactInputs(**LEARNED),
            "omniquant": OmniQuant(**LEARNED),
            "qat": Qat(),
        },
    ),
    "W3A16g64": (
        "int3_g64_asym",
        32,
        {"rtn": Range(), "gptq": Gptq(), "omniquant": OmniQuant(**LEARNED), "qat": Qat()},
    ),
    "W4A16g64": ("int4_g64_asym", 32, {"rtn": Range(), "gptq": Gptq(), "omniquant": OmniQuant(**LEARNED)}),
    "W4A6g64": (
        "int4_g64_asym",
        6,
        {"rtn": Range(), "omniquant": OmniQuant(transform=True, activation_bits=6, **LEARNED)},
    ),
    "W4A4g64": (
        "int4_g64_asym",
        4,
        {
            "rtn": Range(),
            "imitation: no transformation": OmniQuant(activation_bits=4, **LEARNED),
            "omniquant": OmniQuant(transform=True, activation_bits=4, **LEARNED),
        },
    ),
}


def read(checkpoint: Checkpoint) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """A model and its weights by name, float32, norms as factors."""
    spec = model_spec(checkpoint)
    source = Source(checkpoint, spec)
    weights = {}
    for weight in spec.weights:
        values = source.floats(weight.name)
        if weight.group == "norm":
            values = factors(spec, {weight.name: values.view(np.uint8)})[weight.name]
        weights[weight.name] = values
    return spec, weights


@torch.no_grad()
def hidden(spec: ModelSpec, weights: Weights, texts: np.ndarray, rounding: Rounding = unchanged) -> torch.Tensor:
    """Hidden states behind the last layer, (n_windows, window, d_model)."""
    x = torch.from_numpy(weights["embed"])[torch.from_numpy(texts).long()] * spec.embed_scale
    for layer in range(spec.n_layers):
        prefix = f"layers.{layer}."
        mine = {n.removeprefix(prefix): torch.from_numpy(w) for n, w in weights.items() if n.startswith(prefix)}
        cos, sin = map(torch.from_numpy, rotations(spec, layer, texts.shape[1]))
        function = LayerFunction(spec, layer, cos, sin, rounding=rounding)
        x = torch.cat([function(mine, window) for window in x.split(1)])
    return torch.nn.functional.rms_norm(x, x.shape[-1:], torch.from_numpy(weights["norm"]), spec.norm_eps)


def scored(weights: Weights, states: torch.Tensor, exact: torch.Tensor, texts: np.ndarray) -> dict[str, float]:
    """Divergence of the logits of ``states`` from those of ``exact``, over the second halves of windows."""
    head, half, divergence = torch.from_numpy(weights.get("head", weights["embed"])), texts.shape[1] // 2, Divergence()
    for ours, theirs, ids in zip(states, exact, texts, strict=True):
        for start in range(half, len(ids) - 1, 64):
            some = slice(start, min(start + 64, len(ids) - 1))
            targets = ids[some.start + 1 : some.stop + 1].astype(np.int64)
            divergence.add((theirs[some] @ head.T).numpy(), (ours[some] @ head.T).numpy(), targets)
    return divergence.summary


def measured(
    model: str, case: str, solver: Solver, calibration: np.ndarray, n_layers: int | None
) -> tuple[ModelSpec, Weights, float]:
    """The fitted model's weights as its folder stores them, and the seconds of processor time that it took."""
    layout = CASES[case][0]
    with tempfile.TemporaryDirectory() as folder, Checkpoint(model) as checkpoint:
        spec = model_spec(checkpoint)
        most = spec.n_layers if n_layers is None else n_layers
        formats = {w.name: layout for w in spec.weights if w.group != "norm" and w.layer is not None and w.layer < most}
        start = time.process_time()
        fit(checkpoint, spec, Fit(formats, solver, calibration), Path(folder)).finish({})
        seconds = time.process_time() - start
        with Checkpoint(folder) as fitted:
            return *read(fitted), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--only", nargs="*", choices=CASES)
    parser.add_argument("--windows", type=int, default=32, help="of calibration")
    parser.add_argument("--scored", type=int, default=8, help="windows that are scored")
    parser.add_argument("--layers", type=int, help="fit only so many, from the first on; the others stay as they are")
    parser.add_argument("--name", default="smollm2")
    args = parser.parse_args()
    torch.manual_seed(0)

    with Checkpoint(args.model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        spec, exact_weights = read(checkpoint)
    calibration, texts = (
        np.array(text_windows(read_text(path), tokenizer, window, window * n), np.int32)
        for path, window, n in (
            (args.calibration, CALIBRATION_WINDOW, args.windows),
            (args.text, WINDOW, args.scored),
        )
    )
    config = {
        "model": Path(args.model).name,
        "calibration": f"{len(calibration)} windows of {CALIBRATION_WINDOW} tokens",
        "scored": f"the second halves of {len(texts)} windows of {WINDOW} tokens",
        "cases": {case: list(CASES[case][2]) for case in args.only or CASES},
        "layers fitted": args.layers or spec.n_layers,
        "activations": "simulated",
    }
    card("learned rounding, layer by layer", config)
    exact = hidden(spec, exact_weights, texts)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case in args.only or CASES:
        _, bits, contenders = CASES[case]
        rounding = per_token(bits) if bits < 32 else unchanged
        for name, solver in contenders.items():
            fitted_spec, weights, seconds = measured(args.model, case, solver, calibration, args.layers)
            found = scored(weights, hidden(fitted_spec, weights, texts, rounding), exact, texts)
            results.setdefault(case, {})[name] = {**found, "fit_cpu_seconds": round(seconds)}
            line = f"KL {found['kl_mean']:.4f}, perplexity {found['perplexity']:.2f}, {seconds:.0f} s of processor time"
            print(f"  {case} {name}: {line}", flush=True)
    save(f"weights/omniquant-{args.name}", {"config": config, "results": results, "claims": claims(results)}, "torch")


def claims(results: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, object]]:
    """The paper's statements of LLaMA models of 7 billion weights and more, as far as they can hold for a small one."""

    def ratio(case: str, ours: str, other: str, key: str) -> float | None:
        there = results.get(case, {})
        return there[ours][key] / there[other][key] if {ours, other} <= there.keys() else None

    rows = [
        ("W2 g64: perplexity against plain rounding's", ratio("W2A16g64", "omniquant", "rtn", "perplexity"), 0.5),
        ("W3 g64: KL against plain rounding's", ratio("W3A16g64", "omniquant", "rtn", "kl_mean"), 0.8),
        ("W4 g64: KL against plain rounding's", ratio("W4A16g64", "omniquant", "rtn", "kl_mean"), 1.0),
        ("W4A4: perplexity against plain rounding's", ratio("W4A4g64", "omniquant", "rtn", "perplexity"), 0.5),
        (
            "W4A4: KL with the transformation against without",
            ratio("W4A4g64", "omniquant", "imitation: no transformation", "kl_mean"),
            0.9,
        ),
        ("W2 g64: KL against a searched clipping", ratio("W2A16g64", "omniquant", "imitation: searched", "kl_mean"), 1),
        ("W2 g64: KL against exact inputs", ratio("W2A16g64", "omniquant", "imitation: exact inputs", "kl_mean"), 1),
        ("W2 g64: KL of OmniQuant against GPTQ's", ratio("W2A16g64", "omniquant", "gptq", "kl_mean"), 1),
        ("W2 g64: KL of qat against GPTQ's", ratio("W2A16g64", "qat", "gptq", "kl_mean"), 0.7),
        ("W3 g64: KL of qat against GPTQ's", ratio("W3A16g64", "qat", "gptq", "kl_mean"), 0.9),
    ]
    return [claim(text, measured, at_most=bound) for text, measured, bound in rows if measured is not None]


if __name__ == "__main__":
    main()
