"""Random adapters, and what a model is with one, worked out from the file alone as PEFT does."""

from __future__ import annotations

import json

import numpy as np

from barefoot.adapters.files import Pair, read_adapter
from barefoot.engine.adapter_files import save_adapter
from barefoot.engine.beside import beside
from barefoot.engine.config import AdapterParts
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def random_pairs(spec, roles=ROLES, rank=4, scale=1.5, seed=3) -> dict[str, Pair]:
    """Pairs of the matrices of these roles, large beside what a model says; ``rank`` may depend on the name."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for w in spec.weights:
        if w.layer is not None and w.name.split(".")[2] in roles:
            r = rank(w.name) if callable(rank) else rank
            a = rng.standard_normal((r, w.cols), dtype=np.float32) * np.float32(w.cols**-0.5)
            b = rng.standard_normal((w.rows, r), dtype=np.float32) * np.float32(r**-0.5 / 2)
            pairs[w.name] = Pair(a, b, scale)
    return pairs


def spec_of(path):
    with Checkpoint(path) as checkpoint:
        return model_spec(checkpoint)


def write_random_adapter(model, folder, *, type_id="f32", **settings) -> AdapterParts:
    """A random adapter for the model at that path, and how the engine takes it."""
    spec = spec_of(model)
    save_adapter(folder, spec, random_pairs(spec, **settings), type_id=type_id)
    return beside(spec, read_adapter(folder))


def changes(folder) -> dict[str, np.ndarray]:
    """What the folder adds to each module, float64, by the names of its tensors; read by the reference reader."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[key].astype(np.float64), tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
            alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
            assert len(a) == config["rank_pattern"].get(name, config["r"])
            found[name] = alpha / len(a) * b @ a
    return found


def merged(model, folder):
    """A transformers model with these changes added to its weights."""
    import torch

    with torch.no_grad():
        for name, change in changes(folder).items():
            weight = model.get_submodule(name).weight
            weight += torch.from_numpy(change.astype(np.float32))
    return model
