"""SIGKILL at random moments of a tuning, which goes on each time: its losses against those of one that wasn't killed.

    python -m benchmarks train.killed MODEL TEXT NAME [--steps 60] [--kills 10] [--threads 2] [--seed 0]

The uninterrupted training runs first; then the same is started, killed after a random time, and started again, until it
has been killed --kills times; the last start ends it. Losses, norms and held-out losses of every step, and the adapter,
must be the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import card, claim, save

COMPARED = ("step", "loss", "norm", "rate", "tokens", "held_out_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("name", help="of the record: train/killed_NAME")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = {"model": Path(args.model).name, "steps": args.steps, "threads": args.threads, "seed": args.seed}
    card("a tuning that is killed", config)
    with tempfile.TemporaryDirectory() as work:
        started = time.monotonic()
        subprocess.run(_command(args, f"{work}/whole"), check=True, capture_output=True)
        whole = time.monotonic() - started
        kills = _killed(args, Path(work, "killed"), whole)
        curves = [_curve(Path(work, name)) for name in ("whole", "killed")]
        same = sum(a == b for a, b in zip(*curves, strict=False))
        adapters = len({_digest(Path(work, name)) for name in ("whole", "killed")})
    claims = [
        claim("steps whose losses and norms are the same bits, of all", same / args.steps, at_least=1.0),
        claim("different adapters at the end", adapters, at_most=1),
        claim("kills", len(kills), at_least=args.kills),
    ]
    save(
        f"train/killed_{args.name}",
        {"config": config, "results": {"killed_behind_step": kills}, "claims": claims},
        "torch",
    )


def _command(args: argparse.Namespace, folder: str) -> Sequence[str]:
    return [
        sys.executable, "-m", "barefoot", "tune", args.model, args.text, "-o", folder, "--length", "64", "--batch", "2",
        "--micro-batch", "64", "--steps", str(args.steps), "--save-every", "4", "--threads", str(args.threads),
        "--adapter", "lora(rank=4,dropout=0.1)", "--memory", "16GiB", "--seed", str(args.seed),
    ]  # fmt: skip


def _killed(args: argparse.Namespace, folder: Path, whole: float) -> list[int]:
    """Behind which step it was killed each time."""
    moments, kills = random.Random(args.seed), []
    while len(kills) < args.kills:
        process = subprocess.Popen(_command(args, str(folder)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.2, 1.2) * whole / 4)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills.append(len(_curve(folder)))
            print(f"  killed behind step {kills[-1]}", flush=True)
        else:  # it was done before its time: from the beginning
            for file in folder.iterdir():
                file.unlink()
    subprocess.run(_command(args, str(folder)), check=True, capture_output=True)
    return kills


def _curve(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: json.loads(line).get(key) for key in COMPARED} for line in lines if line.endswith("}")]


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
