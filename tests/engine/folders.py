"""Tiny models as folders and fitted models, for the tests of what is written."""

from __future__ import annotations

import numpy as np
import tiny

from barefoot.core.model import ModelSpec
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.rows import decode, read_rows
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer_export import export_tokenizer
from barefoot.io.tokenizer_files import read_gguf_tokenizer
from barefoot.plan.job import parse_weights
from barefoot.weights.solvers.range import Range


def save(model, folder, tiny_gguf) -> None:
    """A transformers model as a folder, with the tokenizer of the tiny GGUF file."""
    model.save_pretrained(folder)
    add_tokenizer(folder, tiny_gguf)


def add_tokenizer(folder, tiny_gguf) -> None:
    with Checkpoint(tiny_gguf.path) as checkpoint:
        export_tokenizer(read_gguf_tokenizer(checkpoint), "{{ messages }}", folder)


def fitted(source, folder, weights: str) -> None:
    """Round every matrix of a model to the formats ``weights``, as ``barefoot fit`` writes it."""
    formats = parse_weights(weights)
    with Checkpoint(source) as checkpoint:
        spec = model_spec(checkpoint)
        chosen = {w.name: formats[w.group].layout(w.format) for w in spec.weights if w.group in formats}
        job = Fit(chosen, Range(), np.empty((0, 0), np.int32))
        fit(checkpoint, spec, job, folder).finish({})


def values(path) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """The spec of a model, and every weight of it in float32, norms as the factors that they multiply by."""
    with Checkpoint(path) as checkpoint:
        spec = model_spec(checkpoint)
        found = {w.name: decode(w.format, read_rows(checkpoint, w), w.cols) for w in spec.weights}
    shift = np.float32(spec.norm_plus_one)
    return spec, {name: v + shift if name.endswith("norm") else v for name, v in found.items()}


def logits(path, ids) -> np.ndarray:
    with tiny.engine(path, chunk=16) as run:
        return tiny.all_logits(run, ids, len(ids) - 2)
