"""LaMDA beside LoRA: how much less it trains and keeps, and how much of the gain on a text it still has.

    python -m benchmarks train.lamda MODEL TRAIN.txt HELD_OUT.txt [--steps 200] [--seeds 3]

All see the same windows of text in the same order. Baseline: LoRA of rank 16. Imitation: A and B random, orthonormal
and frozen, with a core that begins at 0 (LoRA-XS without its decomposition). Beside them LaMDA++. Each has the best of
its rates, by the held-out loss of its first seed, and LaMDA++ has LaMDA's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from barefoot.adapters import Beside
from barefoot.adapters.driver.spectral import Spectral
from barefoot.adapters.lamda import LaMDA
from barefoot.adapters.lora import LoRA
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.train import NOTHING, MicroBatch
from barefoot.train.driver.decoder import Decoder
from barefoot.train.driver.loop import Settings, Trainer
from barefoot.train.footprint import Tuning, footprint
from barefoot.train.losses.cce import CutCrossEntropy
from barefoot.train.schedule import Schedule
from benchmarks.harness import card, claim, save

LOSS = CutCrossEntropy()
CONTENDERS: dict[str, Beside] = {
    "lora": LoRA(rank=16),
    "lamda": LaMDA(rank=32),
    "lamda++": LaMDA(rank=32, ranks="spectrum"),
    "random core": LaMDA(rank=32, init="zero_core", eta=0.0),
}
RATES = {"lora": (5e-4, 2e-3), "lamda": (1e-4, 3e-4), "random core": (3e-3, 1e-2)}


class Windows:
    """``per_step`` windows of ``length`` tokens a step, in an order that follows from the seed."""

    def __init__(self, ids: np.ndarray, length: int, per_step: int, seed: int) -> None:
        self._windows = ids[: len(ids) // length * length].reshape(-1, length)
        self._order, self._per_step, self._at = np.random.default_rng(seed).permutation(len(self._windows)), per_step, 0

    def step(self) -> Sequence[MicroBatch]:
        picked = self._order[np.arange(self._at, self._at + self._per_step) % len(self._order)]
        self._at += self._per_step
        return [stream(self._windows[picked])]

    @property
    def place(self) -> dict[str, int]:
        return {"at": self._at}


def stream(windows: np.ndarray) -> MicroBatch:
    labels = np.concatenate([windows[:, 1:], np.full((len(windows), 1), NOTHING)], axis=1)
    return MicroBatch(windows.reshape(-1), labels.reshape(-1), (windows.shape[1],) * len(windows))


def randomize(decoder: Decoder, seed: int) -> None:
    """Random orthonormal factors in the place of those of the decomposition."""
    random = torch.Generator().manual_seed(seed)
    for module in decoder.modules():
        if isinstance(module, Spectral):
            for factor in (module.A, module.B):
                q, _ = torch.linalg.qr(torch.randn(factor.shape[::-1], generator=random))
                factor.data.copy_(q.T)


def run(args: argparse.Namespace, name: str, text: np.ndarray, held: list[MicroBatch], rate: float, seed: int) -> Any:
    adapter = CONTENDERS[name]
    with Checkpoint(args.model) as checkpoint:
        spec = model_spec(checkpoint)
        decoder = Decoder(checkpoint, spec, adapter, seed=seed, activations="keep", compute=args.compute)
        if name == "random core":
            randomize(decoder, seed)
        schedule = Schedule("cosine", 0.03)
        settings = Settings(args.steps, lambda step: rate * schedule.share(step, args.steps), save_every=0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(decoder, LOSS, settings, "", Path(folder))
            before = trainer.evaluate(held)
            seconds = [step.seconds for step in trainer.run(Windows(text, args.length, args.batch, seed))]
            after = trainer.evaluate(held)
    found = {"rate": rate, "before": before, "after": after, "gain": before - after, "s": statistics.median(seconds)}
    print(f"  {name:<12} seed {seed} rate {rate:g}: {before:.4f} to {after:.4f}, {found['s']:.2f} s a step", flush=True)
    return found


def stated(args: argparse.Namespace, adapter: Beside, step: int) -> dict[str, int]:
    """Bytes behind a step: of what learns, its moments, and of what all passes keep."""
    with Checkpoint(args.model) as checkpoint:
        spec = model_spec(checkpoint)
    n = args.length * args.batch
    tuning = Tuning(adapter, LOSS, n, args.length, {}, "keep", args.compute, step=step, steps=args.steps)
    found = footprint(spec, tuning)
    return {
        "trained": adapter.n_trained(spec, step, args.steps),
        "optimizer_bytes": found.select(kind="optimizer").bytes,
        "activation_bytes": found.select(kind="activations").bytes,
        "peak_bytes": found.peak()[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="windows of a step")
    parser.add_argument("--windows", type=int, default=32, help="held out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--name", default="smollm2-135m-dithered")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with Checkpoint(args.model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    wanted = args.steps * args.batch * args.length
    text = np.array(tokenizer.encode(Path(args.train).read_text("utf-8")[: 8 * wanted]), np.int64)
    most = args.windows * args.length
    judged = np.array(tokenizer.encode(Path(args.held_out).read_text("utf-8")[: 8 * most])[:most], np.int64)
    held = [stream(part) for part in judged.reshape(-1, args.batch, args.length)]
    bytes_of = {
        name: {"begin": stated(args, adapter, 0), "end": stated(args, adapter, args.steps)}
        for name, adapter in CONTENDERS.items()
    }
    card("train.lamda", {"model": args.model, "tokens a step": args.length * args.batch, "steps": args.steps})
    results: dict[str, Any] = {}
    for name in CONTENDERS:
        rates = RATES.get(name) or (results["lamda"]["runs"][0]["rate"],)
        tried = [run(args, name, text, held, rate, 0) for rate in rates]
        best = min(tried, key=lambda found: found["after"])
        runs = [best, *(run(args, name, text, held, best["rate"], seed) for seed in range(1, args.seeds))]
        results[name] = {"bytes": bytes_of[name], "tried": tried, "runs": runs}
    gains = {name: statistics.mean(found["gain"] for found in each["runs"]) for name, each in results.items()}
    shares = [
        mine["gain"] / its["gain"] for mine, its in zip(results["lamda"]["runs"], results["lora"]["runs"], strict=True)
    ]
    spread = 2 * statistics.stdev(shares) if len(shares) > 1 else 0.0
    lora, lamda = bytes_of["lora"], bytes_of["lamda"]
    fewer = lora["end"]["trained"] / lamda["end"]["trained"]
    off = abs(results["lamda"]["runs"][0]["before"] - results["lora"]["runs"][0]["before"])
    claims = [
        claim("numbers that learn at the end, LoRA's over LaMDA's", fewer, at_least=10.0),
        claim(
            "share of LoRA's gain, mean less twice the spread of the seeds",
            statistics.mean(shares) - spread,
            at_least=0.8,
        ),
        claim("gain over the random core's", gains["lamda"] / gains["random core"], at_least=1.0),
        claim(
            "difference of the losses before the first step", off, at_most=1e-4 if args.compute == "float32" else 1e-2
        ),
        claim(
            "activations that a pass keeps, of LoRA's",
            lamda["begin"]["activation_bytes"] / lora["begin"]["activation_bytes"],
            at_most=1.0,
        ),
    ]
    record = {
        "config": {k: v for k, v in vars(args).items() if k not in ("model", "train", "held_out")},
        "card": {
            "model": Path(args.model).name,
            "text": f"{Path(args.train).name}, {Path(args.held_out).name}",
            "trained_tokens": wanted,
            "held_out_tokens": int(sum(batch.n_predicted for batch in held)),
            "paper": "up to 17.7 times fewer parameters updated, up to 1.32 times less peak memory, as good as LoRA",
            "seeds": args.seeds,
        },
        "results": results,
        "ratios": {"gains": gains, "perplexity": {n: math.exp(r["runs"][0]["after"]) for n, r in results.items()}},
        "claims": claims,
    }
    save(f"train/lamda_{args.name}", record, "torch")


if __name__ == "__main__":
    main()
