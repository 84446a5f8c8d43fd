"""QLoRA: how much of what NF4 loses adapters win back, beside a base of 16 bits that is tuned in the same way.

    python -m benchmarks train.qlora MODEL TRAIN.txt HELD_OUT.txt [--steps 60] [--seeds 3]

Arms differ in the base's matrices and in the adapter, and see the same windows of text in the same order. A gap is the
held-out loss over a rounded base less that over the base of 16 bits, both before tuning or both after it, paired by
windows of HELD_OUT. Baseline: the base of 16 bits. Ablation: FP4, the minifloat of two bits of exponent and one of
mantissa. Imitation: adapters on q and v only. The first seed has all arms, the others those that the claims are about.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from barefoot import ops
from barefoot.adapters.lora import LoRA
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.plan.job import parse_weights
from barefoot.train import MicroBatch
from barefoot.train.driver.cross_entropy import cross_entropy
from barefoot.train.driver.decoder import Decoder
from barefoot.train.driver.loop import Settings, Trainer
from barefoot.train.losses.cce import CutCrossEntropy
from barefoot.train.schedule import Schedule
from barefoot.weights.module import PackedLinear
from benchmarks.harness import card, claim, save
from benchmarks.train.lamda import Windows, stream

LOSS = CutCrossEntropy()
BASES = {"16 bits": "dense(dtype=bf16)", "nf4": "nf4(double=true)", "fp4": "minifloat(group=64)"}


@dataclass(frozen=True)
class Arm:
    base: str
    adapter: LoRA
    in_all_seeds: bool = False


ARMS = {
    "16 bits": Arm("16 bits", LoRA(rank=16), in_all_seeds=True),
    "nf4": Arm("nf4", LoRA(rank=16), in_all_seeds=True),
    "nf4, q and v only": Arm("nf4", LoRA(rank=16, targets="qv")),
    "fp4": Arm("fp4", LoRA(rank=16)),
    "16 bits, rank 64": Arm("16 bits", LoRA(rank=64, alpha=64.0)),
    "nf4, rank 64": Arm("nf4", LoRA(rank=64, alpha=64.0)),
}
GAPS = {  # of an arm, to which
    "nf4": "16 bits",
    "nf4, q and v only": "16 bits",
    "fp4": "16 bits",
    "nf4, rank 64": "16 bits, rank 64",
}


@torch.no_grad()
def losses(decoder: Decoder, held: list[MicroBatch]) -> np.ndarray:
    """Of each window, nats a predicted token."""
    decoder.eval()
    found = []
    for batch in held:
        labels, lengths = torch.from_numpy(batch.labels), list(batch.lengths)
        for some, wanted in zip(decoder.hidden(batch).split(lengths), labels.split(lengths), strict=True):
            found.append(float(cross_entropy(LOSS, some, decoder.head, wanted)))
    return np.array(found)


def tuned(args: argparse.Namespace, arm: Arm, text: np.ndarray, held: list[MicroBatch], seed: int) -> dict[str, Any]:
    with Checkpoint(args.model) as checkpoint:
        formats = {group: parse_weights(BASES[arm.base])[group] for group in ("attn", "ffn")}
        decoder = Decoder(checkpoint, model_spec(checkpoint), arm.adapter, formats=formats, seed=seed)
    decoder.activations = "keep"
    before = losses(decoder, held)
    schedule = Schedule("cosine", 0.1)
    settings = Settings(args.steps, lambda step: args.rate * schedule.share(step, args.steps), save_every=0)
    windows = Windows(text, args.length, args.batch, seed)
    with tempfile.TemporaryDirectory() as folder:
        steps = list(Trainer(decoder, LOSS, settings, "", Path(folder)).run(windows))
    after = losses(decoder, held)
    linears = [m for m in decoder.layers.modules() if isinstance(m, PackedLinear)]
    found = {
        "base_bytes": sum(m.n_bytes for m in linears),
        "trained": sum(p.numel() for p in decoder.adapters().values()),
        "before": before.tolist(),
        "after": after.tolist(),
        "s": statistics.median(step.seconds for step in steps),
    }
    print(f"  {before.mean():.4f} to {after.mean():.4f}, {found['s']:.2f} s a step", flush=True)
    return found


def gaps(runs: dict[str, list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """Before and after, means of the seeds that both have; the standard error is that of the windows' mean."""
    both = list(zip(runs[name], runs[GAPS[name]], strict=False))
    before, after = (np.mean([np.subtract(a[k], b[k]) for a, b in both], axis=0) for k in ("before", "after"))
    closed = before - after
    error = float(closed.std(ddof=1) / len(closed) ** 0.5)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "after_by_seed": [float(np.subtract(a["after"], b["after"]).mean()) for a, b in both],
        "closed": float(closed.mean()),
        "error": error,
    }


def record(args: argparse.Namespace, facts: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> None:
    found = {name: gaps(runs, name) for name in GAPS if runs.get(name)}
    claims = []
    for name, label in (("nf4", "rank 16"), ("nf4, rank 64", "rank 64")):
        if name in found:
            each = found[name]
            closed, left = each["closed"] / each["error"], each["after"] / each["before"]
            claims += [
                claim(f"gap that tuning closes, in standard errors, {label}", closed, at_least=2.0),
                claim(f"gap after tuning over the gap before, {label}", left, at_most=0.5),
            ]
    paper = "NF4 with double quantization as good as 16 bits on MMLU, 7 to 65B; FP4 about a point behind"
    config = {k: v for k, v in vars(args).items() if k not in ("model", "train", "held_out")}
    seeds = {name: len(each) for name, each in runs.items()}
    body = {"config": config, "card": {**facts, "paper": paper, "seeds": seeds}, "results": runs}
    save(f"train/qlora_{args.name}", {**body, "ratios": {"gaps": found}, "claims": claims}, "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2, help="windows of a step")
    parser.add_argument("--windows", type=int, default=32, help="held out")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="smollm2-135m-dithered")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ops.set_threads(args.threads)
    with Checkpoint(args.model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    text = np.array(tokenizer.encode(Path(args.train).read_text("utf-8")), np.int64)
    most = args.windows * args.length
    judged = np.array(tokenizer.encode(Path(args.held_out).read_text("utf-8")[: 16 * most])[:most], np.int64)
    held = [stream(part) for part in judged.reshape(-1, 4, args.length)]
    facts = {
        "model": Path(args.model).name,
        "text": f"{Path(args.train).name}, {Path(args.held_out).name}",
        "trained_tokens": args.steps * args.batch * args.length,
        "held_out_tokens": sum(batch.n_predicted for batch in held),
    }
    card("train.qlora", facts)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        for name, arm in ARMS.items():
            if seed == 0 or arm.in_all_seeds:
                print(f"{name}, seed {seed}", flush=True)
                runs.setdefault(name, []).append(tuned(args, arm, text, held, seed))
        record(args, facts, runs)


if __name__ == "__main__":
    main()
