"""One row of the low-bit study in a process of its own: fit, then score on text. JSON settings in, JSON row out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.core.measure import peak_resident
from barefoot.core.model import MATRIX_GROUPS, ModelSpec
from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.engine.config import EngineConfig
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.placement import stored_bytes
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import Divergence
from barefoot.evals.scoring import spread_windows, text_windows
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import Tokenizer, load_tokenizer
from barefoot.ops import set_threads

TILE = 32  # tokens whose logits of both engines are in memory


def fitted(settings: dict[str, Any], folder: Path) -> float:
    """Write the fitted model; returns the seconds it took."""
    started = time.perf_counter()
    role, text = settings["role"], settings["how"]
    (how,) = parse_composition(text, techniques(role), role)
    (solver,) = parse_composition(settings["solver"], techniques("weights.solvers"), "weights.solvers")
    with Checkpoint(settings["model"]) as checkpoint:
        spec = model_spec(checkpoint)
        matrices = [w for w in spec.weights if w.group in ("attn", "ffn")]
        chosen = {w.name: how.layout(w.format) if role == "weights.formats" else how for w in matrices}
        # Embedding and head are the same in every row, as in the paper.
        chosen |= {w.name: "f16" for w in spec.weights if w.group in ("embed", "head")}
        tokenizer = load_tokenizer(checkpoint)
        texts = spread_windows(
            read_text(settings["calibration"]), tokenizer, settings["window"], settings["calibration_windows"]
        )
        fit(checkpoint, spec, Fit(chosen, solver, texts), folder).finish(settings)
    return time.perf_counter() - started


def words_of(ids: Sequence[int], tokenizer: Tokenizer, first: int) -> list[range]:
    """The tokens of each whole word that begins at token ``first`` or later."""
    pieces = [tokenizer.decode_bytes(i) for i in ids]
    starts = [i for i in range(first, len(ids)) if pieces[i][:1] == b" " and pieces[i][1:].isalpha()]
    found = []
    for start in starts:
        stop = start + 1
        while stop < len(ids) and pieces[stop].isalpha():
            stop += 1
        if stop < len(ids):
            found.append(range(start, stop))
    return found


def scored(settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Perplexity, divergence from the reference, and the share of words that are foreseen."""
    with (
        Checkpoint(settings["model"]) as there,
        Checkpoint(folder) as here,
        Engine(there, model_spec(there), config(settings)) as reference,
        Engine(here, model_spec(here), config(settings)) as engine,
    ):
        tokenizer = load_tokenizer(there)
        n_tokens = settings["windows"] * settings["window"]
        texts = text_windows(read_text(settings["text"]), tokenizer, settings["window"], n_tokens)
        divergence, n_words, foreseen = Divergence(), 0, {"words": 0, "reference_words": 0}
        for ids in texts:
            half = len(ids) // 2
            right = {name: np.zeros(len(ids), bool) for name in foreseen}
            for each in (reference, engine):
                each.reset()
                each.prefill(ids[:half])
            for start in range(half, len(ids) - 1, TILE):
                stop = min(start + TILE, len(ids) - 1)
                targets = np.asarray(ids[start + 1 : stop + 1], np.int64)
                tiles = [logits_of(each, ids[start:stop]) for each in (reference, engine)]
                divergence.add(*tiles, targets)
                for name, tile in zip(("reference_words", "words"), tiles, strict=True):
                    right[name][start + 1 : stop + 1] = tile.argmax(axis=1) == targets
            spans = words_of(ids, tokenizer, half + 1)
            n_words += len(spans)
            for name in foreseen:
                foreseen[name] += sum(bool(right[name][list(span)].all()) for span in spans)
    shares = {name: count / max(n_words, 1) for name, count in foreseen.items()}
    return divergence.summary | shares | {"n_words": n_words}


def logits_of(engine: Engine, ids: Sequence[int]) -> np.ndarray:
    kept: list[np.ndarray] = []
    engine.prefill(ids, all_logits=lambda _, logits: kept.append(logits.copy()))
    return np.concatenate(kept)


def config(settings: dict[str, Any]) -> EngineConfig:
    return EngineConfig(
        context=settings["window"],
        kv=techniques("kv.stores")["f32"](),
        chunk=128,
        activations="float32",
        n_logits=TILE,
        n_threads=settings["threads"],
    )


def sizes(folder: Path) -> dict[str, float]:
    """Stored bits a weight in the layers' matrices and in all of the file, scales and parts included."""
    with Checkpoint(folder) as checkpoint:
        spec = model_spec(checkpoint)
    return {
        "layer_bits": bits(spec, ("attn", "ffn")),
        "model_bits": bits(spec, MATRIX_GROUPS),
        "weight_bytes": sum(map(stored_bytes, spec.weights)),
    }


def bits(spec: ModelSpec, groups: Sequence[str]) -> float:
    chosen = [w for w in spec.weights if w.group in groups]
    return 8 * sum(map(stored_bytes, chosen)) / sum(w.rows * w.cols for w in chosen)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    set_threads(given["threads"])
    target = Path(given["folder"])
    seconds = fitted(given, target)
    peak = peak_resident()
    row = {"fit_seconds": round(seconds, 1), "fit_peak_bytes": peak, **sizes(target), **scored(given, target)}
    print(json.dumps(row))
