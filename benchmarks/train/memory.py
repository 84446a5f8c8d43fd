"""Predicted against measured memory of tuning: adapters × bases × losses × lengths × what is kept, a process each.

    python -m benchmarks train.memory MODEL TEXT NAME [--threads 2] [--steps 2]

TEXT is a plain text file, or JSONL. Every combination trains for a few steps through the command line; the process's
own high-water mark is what the prediction is held against, and neither may lie below the other's bounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import card, claim, save

ADAPTERS = ("lora(rank=4)", "lora(rank=32)")
BASES = ("stored", "nf4")
LOSSES = ("plain", "cce")
LENGTHS = (128, 512)
KEPT = ("recompute", "keep")
LEAST, MOST = 0.0, 0.08  # predicted over measured, less one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("name", help="of the record: train/memory_NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    grid = list(itertools.product(ADAPTERS, BASES, LOSSES, LENGTHS, KEPT))
    config = {"model": Path(args.model).name, "threads": args.threads, "steps": args.steps, "combinations": len(grid)}
    card("predicted against measured memory of tuning", config)
    results = []
    for adapter, base, loss, length, kept in grid:
        found = _tune(args, adapter, base, loss, length, kept)
        results.append({"adapter": adapter, "base": base, "loss": loss, "length": length, "activations": kept, **found})
        print(
            f"  {adapter:22s} {base:12s} {loss:6s} {length:4d} {kept:10s} {found['predicted_over_measured']:.3f}",
            flush=True,
        )
    ratios = [each["predicted_over_measured"] for each in results]
    claims = [
        claim("predicted over measured, least", min(ratios), at_least=1 + LEAST),
        claim("predicted over measured, most", max(ratios), at_most=1 + MOST),
    ]
    save(f"train/memory_{args.name}", {"config": config, "results": results, "claims": claims}, "torch")


def _tune(args: argparse.Namespace, adapter: str, base: str, loss: str, length: int, kept: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "barefoot", "tune", args.model, args.text,
            "-o", f"{folder}/out", "--json", f"{folder}/out.json",
            "--memory", "16GiB", "--adapter", adapter, "--loss", loss, "--length", str(length), "--activations", kept,
            "--batch", "1" if length > 256 else "4", "--micro-batch", str(length * (1 if length > 256 else 4)),
            "--steps", str(args.steps), "--save-every", "1", "--threads", str(args.threads),
            *(() if base == "stored" else ("--weights", base)),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        found = json.loads(Path(folder, "out.json").read_text())
    predicted, measured = found["predicted_peak_bytes"], found["measured_peak_bytes"]
    return {
        "predicted_mib": predicted / 2**20,
        "measured_mib": measured / 2**20,
        "predicted_over_measured": predicted / measured,
        "phase": found["plan"]["peak_phase"],
    }


if __name__ == "__main__":
    main()
