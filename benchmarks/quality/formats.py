"""What each format costs in quality: KL to the model as stored, one group of matrices at a time.

    python -m benchmarks.quality.formats MODEL NAME [--text FILE] [--windows 4] [--window 512] [--stored float]

MODEL is a GGUF file or folder; use a dithered one (benchmarks/quality/dithered.py) so that no grid is privileged, and
``--stored q4_1`` when it is a quantized file as it comes. All runs keep activations and the KV cache in float32, so
that what is seen is the weights' share; the cost of int8 activations has a row of its own, and caches have a benchmark
of their own (quality.kv). The record's ``kl`` is in the shape of ``plan/quality.toml``, and its ratio says how far the
planner's additive model is off when all groups are 4-bit.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from barefoot.core.model import MATRIX_GROUPS, ModelSpec, WeightGroup
from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import Divergence, windows
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.stores.f32 import FloatStore
from benchmarks.harness import card, save

FORMATS = (
    "int(bits=8)",
    "int",
    "int(group=64)",
    "int(bits=3)",
    "int(bits=3,group=64)",
    "int(bits=2)",
    "int(bits=2,group=64)",
)
STORED_BITS = {"q4_0": 4, "q4_1": 4, "q4_k": 4, "q5_0": 5, "q6_k": 6, "q8_0": 8}


def text_of(path: str | None) -> str:
    """A text file, or the English of Python's own help topics, which is always there."""
    return Path(path).read_text() if path else "\n\n".join(pydoc_data.topics.topics.values())


def groups_of(spec: ModelSpec) -> list[WeightGroup]:
    return [group for group in MATRIX_GROUPS if any(w.group == group for w in spec.weights)]


def scored(model: str, config: EngineConfig, texts: list[list[int]]) -> Iterator[np.ndarray]:
    """Logits of each window's second half, (window / 2 - 1, vocabulary), one window after the other."""
    with Checkpoint(model) as checkpoint, Engine(checkpoint, model_spec(checkpoint), config) as engine:
        for tokens in texts:
            engine.reset()
            half = len(tokens) // 2
            engine.prefill(tokens[:half])
            kept: list[np.ndarray] = []
            engine.prefill(tokens[half:], all_logits=lambda _, logits, kept=kept: kept.append(logits.copy()))
            yield np.concatenate(kept)[:-1]


def candidates(
    model: str, window: int, groups: list[WeightGroup] | None
) -> tuple[EngineConfig, dict[str, EngineConfig]]:
    """The reference configuration, and ``group=format`` → configuration of everything that is measured."""
    with Checkpoint(model) as checkpoint:
        spec = model_spec(checkpoint)
    formats = techniques("weights.formats")

    def config(**changes: object) -> EngineConfig:
        settings = {"activations": "float32", "n_threads": 2, "chunk": 128, "n_logits": 128, "kv": FloatStore()}
        return EngineConfig(context=window, **{**settings, **changes})  # type: ignore[arg-type]

    found: dict[str, EngineConfig] = {}
    groups = groups or groups_of(spec)
    for group in groups:
        matrices = [w for w in spec.weights if w.group == group]
        bits = min(STORED_BITS.get(w.format, 16) for w in matrices)
        for text in FORMATS:
            fmt = parse_composition(text, formats, "weights")[0]
            if fmt.bits <= bits and all(w.cols % fmt.group == 0 for w in matrices):  # type: ignore[attr-defined]
                found[f"{group}={text}"] = config(weights={group: fmt})
    found["activations=int8"] = config(activations="int8")
    found["all=int"] = config(weights=dict.fromkeys(groups, parse_composition("int", formats, "weights")[0]))
    return config(), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stored", default="float")
    parser.add_argument("--groups", nargs="*")
    args = parser.parse_args()

    with Checkpoint(args.model) as checkpoint:
        spec = model_spec(checkpoint)
        tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(text_of(args.text)[: 12 * args.windows * args.window], add_bos=False)
    texts = list(windows(ids, args.window, tokenizer.bos_id if tokenizer.add_bos else None))[: args.windows]
    exact, runs = candidates(args.model, args.window, args.groups)
    settings = {
        "text": Path(args.text).name if args.text else "pydoc_data.topics",
        "windows": len(texts),
        "window": args.window,
        "tokens scored": len(texts) * (args.window - args.window // 2 - 1),
        "stored": args.stored,
        "stored_types": {g: sorted({w.format for w in spec.weights if w.group == g}) for g in groups_of(spec)},
        "parameters": spec.n_parameters,
    }
    card(f"quality of formats on {args.name}", settings | {"runs": len(runs)})
    reference = list(scored(args.model, exact, texts))
    results: dict[str, dict[str, float]] = {}
    kl: dict[str, dict[str, float]] = {}
    for name, config in runs.items():
        start = time.perf_counter()
        divergence = Divergence()
        for tokens, there, here in zip(texts, reference, scored(args.model, config, texts), strict=True):
            divergence.add(there, here, np.asarray(tokens[len(tokens) // 2 + 1 :]))
        results[name] = divergence.summary
        group, text = name.split("=", 1)
        kl.setdefault(group, {})[text] = round(results[name]["kl_mean"], 5)
        figures = "  ".join(f"{key} {value:.5g}" for key, value in results[name].items())
        print(f"  {name:28} {figures}  {time.perf_counter() - start:.0f} s", flush=True)
    added = sum(by_format.get("int", 0.0) for group, by_format in kl.items() if group != "all")
    ratio = round(kl["all"]["int"] / added, 3) if added else None
    save(
        f"quality/{args.name}",
        {
            "config": settings,
            "results": results,
            "kl": kl,
            "ratios": {"KL of int in all groups / sum of the groups' KL": ratio},
            "claims": [],
        },
    )


if __name__ == "__main__":
    main()
