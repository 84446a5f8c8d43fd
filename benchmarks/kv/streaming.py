"""A text longer than a model was trained for, in a cache that doesn't grow: likelihood along the way.

    python -m benchmarks kv.streaming MODEL NAME --text FILE [--tokens 14336] [--keep 1024] [--piece 256]

The text passes in pieces, each of which is a prompt behind what is kept, and every token is scored. ``sinks`` with
distances between slots is StreamingLLM; with distances between tokens its first positions move away beyond what the
model has seen; without first positions it is a plain sliding window; f16 keeps everything.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import log_softmax
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.plan.job import parse_kv
from benchmarks.harness import card, claim, save

F32 = npt.NDArray[np.float32]
BUCKET = 2048  # tokens whose likelihood is one figure
ARMS = ("sinks(keep=KEEP,rope=slot)", "sinks(keep=KEEP)", "sinks(keep=KEEP,first=0)", "f16")


def likelihoods(checkpoint: Checkpoint, kv: str, ids: list[int], piece: int, n_threads: int) -> tuple[F32, int]:
    """Log-probability of each token behind the first one, and the bytes of the cache."""
    config = EngineConfig(
        context=len(ids), kv=parse_kv(kv), chunk=128, activations="float32", n_logits=64, n_threads=n_threads
    )
    found = np.zeros(len(ids), np.float32)
    spec = replace(model_spec(checkpoint), context_length=len(ids))  # which is refused elsewhere, for good reason
    with Engine(checkpoint, spec, config) as engine:
        for start in range(0, len(ids), piece):

            def score(at: int, logits: F32, start: int = start) -> None:
                follow = ids[start + at + 1 : start + at + 1 + len(logits)]
                logs = log_softmax(logits[: len(follow)])
                found[start + at + 1 : start + at + 1 + len(follow)] = logs[np.arange(len(follow)), follow]

            engine.prefill(ids[start : start + piece], all_logits=score)
        return found[1:], engine.footprint.select(kind="kv", phase="decode").bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: streaming_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--tokens", type=int, default=14_336)
    parser.add_argument("--keep", type=int, default=1024)
    parser.add_argument("--piece", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with Checkpoint(args.model) as checkpoint:
        trained = model_spec(checkpoint).context_length
        ids = list(load_tokenizer(checkpoint).encode(read_text(args.text)))[: args.tokens]
        config = {**vars(args), "model": Path(args.model).name, "text": Path(args.text).name, "trained": trained}
        card(f"streaming {len(ids)} tokens through {args.name}", config)
        for arm in ARMS:
            kv = arm.replace("KEEP", str(args.keep))
            found, n_bytes = likelihoods(checkpoint, kv, ids, args.piece, args.threads)
            nll = [-float(found[i : i + BUCKET].mean()) for i in range(0, len(found), BUCKET)]
            results[arm] = {"kv_bytes": n_bytes, "nll": nll}
            print(f"  {kv:32} {n_bytes / 2**20:7.2f} MiB  {' '.join(f'{x:.3f}' for x in nll)}", flush=True)
    late = trained // BUCKET  # the buckets beyond what the model was trained for
    mean = {arm: float(np.mean(each["nll"][late:])) for arm, each in results.items()}
    claims = [
        claim(f"NLL beyond {trained} tokens: distances of slots less {what}", mean[ARMS[0]] - mean[arm], at_most=0.0)
        for what, arm in (("those of tokens", ARMS[1]), ("a plain window", ARMS[2]), ("all of it", ARMS[3]))
    ]
    save(f"kv/streaming_{args.name}", {"config": config, "results": results, "claims": claims})


if __name__ == "__main__":
    main()
