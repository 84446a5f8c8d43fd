"""One layer of every architecture, with random weights: what tests of folds and of training compare functions on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import tiny

from barefoot.core.model import ModelSpec
from barefoot.engine.layer_pass import LayerPass
from barefoot.engine.specs import architectures, spec_from_config

N_TOKENS = 21


def specs() -> dict[str, ModelSpec]:
    """By name: the tiny models of all architectures, and Llama with neighbouring channels turned together."""
    found = {}
    for name, (_, _, settings) in tiny.MODELS.items():
        arch = next(arch for arch in architectures() if name.startswith(arch))
        config = {**tiny.COMMON, **settings, "model_type": architectures()[arch].HF_TYPES[0]}
        if config.get("rope_parameters", {}).get("rope_type") == "longrope":
            config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 10_000.0}
        found[name] = spec_from_config(config, name)
    assert {spec.arch for spec in found.values()} == set(architectures())
    turned = found["llama"]
    layers = tuple(replace(layer, rope=replace(layer.rope, interleaved=True)) for layer in turned.layers)
    return found | {"llama-interleaved": replace(turned, layers=layers)}


SPECS = specs()
#: (name, layer): the first layer of every model, and the last where it differs.
CASES = [(n, i) for n, s in SPECS.items() for i in ({0, s.n_layers - 1} if s.layers[0] != s.layers[-1] else {0})]


@dataclass(frozen=True)
class RandomLayer:
    """``weights`` by role, float32: matrices (rows, cols), biases, and norms as factors."""

    spec: ModelSpec
    layer: int
    weights: dict[str, np.ndarray]
    x: np.ndarray

    def output(self, weights=None) -> np.ndarray:
        """What the layer makes of ``x``, by the engine's own pass."""
        weights = self.weights if weights is None else weights
        vectors = {r: np.ascontiguousarray(w) for r, w in weights.items() if w.ndim == 1}
        return LayerPass(self.spec, self.layer, vectors)(self.x, weights)


def random_layer(
    name: str, layer: int = 0, n_tokens: int = N_TOKENS, seed: int = 3, spec: ModelSpec | None = None
) -> RandomLayer:
    """A layer of the model of that name, or of ``spec``."""
    spec, rng = spec or SPECS[name], np.random.default_rng(seed)
    weights = {}
    for weight in spec.weights:
        if weight.layer == layer:
            role = weight.name.rsplit(".", 1)[-1]
            values = rng.standard_normal((weight.rows, weight.cols), np.float32)
            if weight.group != "norm":
                weights[role] = values * np.float32(weight.cols**-0.5)
            else:
                weights[role] = values[0] * np.float32(0.3) + np.float32(role.endswith("norm"))
    return RandomLayer(spec, layer, weights, rng.standard_normal((n_tokens, spec.d_model), np.float32))
