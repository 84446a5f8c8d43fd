"""LoRAM: an adapter trained beside a pruned copy and put back, beside one trained where it is to serve.

    python -m benchmarks train.loram MODEL GENERAL.txt [--steps 100] [--align 100] [--ratio 0.33]

The copy lacks a third of the feed-forward channels and a group of heads in all layers but the first two and the last
two. It is aligned, all its matrices learning, on GENERAL.txt; adapters learn the text of Python's own help on its
topics, every eighth window of which is held out. Four losses of that: the model untuned (L0), with what the copy
learned put back (L1), the copy with it (L2, train small and infer small), and LoRA beside the model itself (L3).
Imitations: no alignment, and units drawn at random.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch

from barefoot.adapters.driver.whole import whole_matrices
from barefoot.adapters.files import Pair
from barefoot.adapters.lora import LoRA
from barefoot.adapters.pruning import Kept, recovered
from barefoot.adapters.pruning.drawn import Drawn
from barefoot.adapters.pruning.taylor import Taylor, group_scores
from barefoot.core.model import ModelSpec
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.train import MicroBatch
from barefoot.train.driver.decoder import Decoder, Frozen
from barefoot.train.driver.importance import importance
from barefoot.train.driver.loop import Settings, Trainer
from barefoot.train.footprint import Tuning, footprint
from barefoot.train.losses.cce import CutCrossEntropy
from barefoot.train.schedule import Schedule
from benchmarks.harness import card, claim, save
from benchmarks.train.lamda import Windows, stream

LOSS, ADAPTER = CutCrossEntropy(), LoRA(rank=8, alpha=16.0)
ALIGN_RATE, RATE = 5e-5, 1e-3


def train(decoder: Decoder, windows: Windows, steps: int, rate: float) -> None:
    schedule = Schedule("cosine", 0.1)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(steps, lambda step: rate * schedule.share(step, steps), save_every=0)
        for _ in Trainer(decoder, LOSS, settings, "", Path(folder)).run(windows):
            pass


def evaluate(decoder: Decoder, held: list[MicroBatch]) -> list[float]:
    """The loss of each micro-batch."""
    decoder.eval()
    with torch.no_grad():
        return [float(decoder.loss(batch, LOSS)) for batch in held]


def put_back(checkpoint: Checkpoint, spec: ModelSpec, pairs: dict[str, Pair]) -> Decoder:
    """The model with an adapter's numbers."""
    decoder = Decoder(checkpoint, spec, ADAPTER, activations="keep")
    with torch.no_grad():
        for name, parameter in decoder.adapters().items():
            matrix, _, letter = name.rpartition(".")
            parameter.copy_(torch.from_numpy(getattr(pairs[matrix], letter.lower())))
    return decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("general")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--align", type=int, default=100)
    parser.add_argument("--ratio", type=float, default=1 / 3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2, help="windows of a step")
    parser.add_argument("--windows", type=int, default=24, help="held out, at most")
    parser.add_argument("--name", default="smollm2-135m-dithered")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with Checkpoint(args.model) as checkpoint:
        spec, tokenizer = model_spec(checkpoint), load_tokenizer(checkpoint)

        def tokens(text: str) -> np.ndarray:
            return np.array(tokenizer.encode(text), np.int64)

        domain = tokens("\n\n".join(topics.topics[key] for key in sorted(topics.topics)))
        windows = domain[: len(domain) // args.length * args.length].reshape(-1, args.length)
        some = windows[::8][: args.windows]
        held = [stream(some[i : i + args.batch]) for i in range(0, len(some), args.batch)]
        learned = np.delete(windows, np.arange(0, len(windows), 8), axis=0).reshape(-1)
        general = tokens(Path(args.general).read_text("utf-8")[: 8 * args.length * args.batch * max(args.align, 10)])

        pruning, lot = (kind(args.ratio, first=2, last=2) for kind in (Taylor, Drawn))
        sizes, layers = pruning.sizes(spec), pruning.layers(spec)
        seen = importance(
            Frozen(checkpoint, spec, resident=False), stream(general[: 4 * args.length].reshape(4, -1)), LOSS, layers
        )
        best = pruning.kept(spec, sizes, 0, lambda: group_scores(spec, *seen, layers))
        drawn = lot.kept(spec, sizes, 0, dict)
        whole = Decoder(checkpoint, spec, ADAPTER, activations="keep")
        results["L0"] = evaluate(whole, held)
        train(whole, Windows(learned, args.length, args.batch, 0), args.steps, RATE)
        results["L3"] = evaluate(whole, held)
        del whole
        print({name: float(np.mean(each)) for name, each in results.items()}, flush=True)

        def variant(name: str, kept: dict[int, Kept], align: int) -> None:
            small = Decoder(checkpoint, spec, ADAPTER, activations="keep", kept=kept)
            if align:
                with whole_matrices(small.layers):
                    train(small, Windows(general, args.length, args.batch, 0), align, ALIGN_RATE)
            found = {"untuned copy": evaluate(small, held)}
            train(small, Windows(learned, args.length, args.batch, 0), args.steps, RATE)
            found["L2"] = evaluate(small, held)
            found["L1"] = evaluate(put_back(checkpoint, spec, recovered(spec, small.pairs(), kept)), held)
            results[name] = found
            print(name, {key: float(np.mean(each)) for key, each in found.items()}, flush=True)
            copied = footprint(spec, replace(tuning, pruning=pruning)).select(kind="weights", phase="forward")
            bytes_of[name] = copied.bytes

        tuning = Tuning(ADAPTER, LOSS, args.length * args.batch, args.length, {})
        bytes_of = {"whole": footprint(spec, tuning).select(kind="weights").bytes}
        card("train.loram", {"parameters": spec.n_parameters, "held-out tokens": sum(b.n_predicted for b in held)})
        variant("best, aligned", best, args.align)
        variant("best", best, 0)
        variant("random", drawn, 0)

    l0, l3 = np.array(results["L0"]), np.array(results["L3"])
    l1, l2 = (np.array(results["best, aligned"][key]) for key in ("L1", "L2"))
    error = float((l0 - l1).std(ddof=1) / len(l0) ** 0.5)
    shares = {
        name: float((l0 - each["L1"]).mean() / (l0 - l3).mean())
        for name, each in results.items()
        if isinstance(each, dict)
    }
    claims = [
        claim("untuned less recovered loss, in standard errors", float((l0 - l1).mean()) / error, at_least=3.0),
        claim("pruned less recovered loss, nats", float((l2 - l1).mean()), at_least=0.0),
        claim("share of direct LoRA's gain that is recovered", shares["best, aligned"], at_least=0.3),
    ]
    record = {
        "config": {k: v for k, v in vars(args).items() if k not in ("model", "general")},
        "card": {
            "model": Path(args.model).name,
            "text": f"{Path(args.general).name} to align, pydoc_data.topics to learn",
            "paper": "LLaMA-2-70B, 12.84 times fewer parameters: GSM8K 57.2, 52.0 untuned; the copy alone collapses",
            "base_bytes": bytes_of,
            "seeds": 1,
        },
        "results": results,
        "ratios": {"recovered": shares},
        "claims": claims,
    }
    save(f"train/loram_{args.name}", record, "torch")


if __name__ == "__main__":
    main()
