"""One fresh process of barefoot: load, prefill, decode; prints its figures as JSON. Argument: settings as JSON.

Settings as in llama_cpp_worker.py, with ``kv``, ``weights``, ``layouts`` (as on the command line), ``chunk``,
``warm_up``, tokens that are decoded before time is taken, and ``snapshot``, a file that what was prefilled is saved to,
or taken from if it is there; no torch, no command line.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from barefoot.core.measure import peak_resident
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.ops.dispatch import parse_layouts
from barefoot.plan.job import parse_kv, parse_weights


def main() -> None:
    settings = json.loads(sys.argv[1])
    logits_of = settings.get("logits_of")
    start = time.perf_counter()
    checkpoint = Checkpoint(settings["model"])
    config = EngineConfig(
        context=settings["context"],
        kv=parse_kv(settings.get("kv", "f16")),
        chunk=settings.get("chunk", 128),
        n_threads=settings["n_threads"],
        activations=settings.get("activations", "int8"),
        weights=parse_weights(settings["weights"]) if "weights" in settings else {},
        layouts=parse_layouts(settings.get("layouts", "panels")),
        n_logits=64 if logits_of else 1,
    )
    engine = Engine(checkpoint, model_spec(checkpoint), config)
    load_s = time.perf_counter() - start
    if "first_token_of" in settings:
        engine.prefill(load_tokenizer(checkpoint).encode(settings["first_token_of"])).argmax()
        print("{}")
        return
    if logits_of:
        kept: list[np.ndarray] = []
        for window in logits_of:
            engine.reset()
            engine.prefill(window[: len(window) // 2])
            engine.prefill(window[len(window) // 2 : -1], all_logits=lambda _, logits: kept.append(logits.copy()))
        np.save(settings["out"], np.concatenate(kept))
        print(json.dumps({"n": sum(map(len, kept))}))
        return
    n_vocab = engine.spec.vocab_size
    ids = [(7 * i) % (n_vocab - 200) + 100 for i in range(settings["prefill"])]
    engine.prefill(ids[:8])
    engine.reset()
    snapshot, prefilled = settings.get("snapshot"), {}
    if snapshot and Path(snapshot).is_file():
        engine.load(Path(snapshot))
    else:
        start = time.perf_counter()
        engine.prefill(ids)
        prefilled = {"prefill_tokens_per_s": settings["prefill"] / (time.perf_counter() - start)}
        if snapshot:
            engine.save(Path(snapshot))
    for i in range(settings.get("warm_up", 0)):  # pages of weights that a long prompt hasn't touched for minutes
        engine.decode(100 + i)
    token, start = 200, time.perf_counter()
    for i in range(settings["decode"]):
        engine.decode(token)
        token = (token * 31 + i) % (n_vocab - 200) + 100
    decode_s = time.perf_counter() - start
    print(
        json.dumps(
            {
                "load_s": load_s,
                **prefilled,
                "decode_tokens_per_s": settings["decode"] / decode_s,
                "peak_mib": (peak_resident() or 0) / 2**20,
                "predicted_mib": engine.footprint.peak()[1] / 2**20,
                "kv_bytes": engine.footprint.select(kind="kv", phase="decode").bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
