"""The same adapters, first values, documents and steps here and in PEFT: memory, time of a step, losses.

    python -m benchmarks train.beside_peft MODEL FOLDER TEXT NAME --peft-python PYTHON [--length 512] [--steps 20]
        [--threads 2] [--rounds 3] [--memory 700MiB]

FOLDER is MODEL in float32 as transformers reads it. Each arm is a fresh process that trains LoRA of rank 16 on one
document a step, from the same file of ids; PEFT over float32, with and without checkpoints, with cut-cross-entropy's
loss, and over bitsandbytes' NF4 and torchao's 8 bits with checkpoints. Ours over the stored base runs once more inside
a memory cgroup of --memory. A round is every arm in turn; a ratio of times is the median of the rounds' own. Time
counts on a machine at rest only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.core.measure import cgroup_reason, run_limited
from barefoot.core.units import parse_bytes
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.train import NOTHING
from benchmarks.harness import card, claim, save

HERE = Path(__file__).parent
OURS = {
    "stored, cce, recompute": {"base": None, "loss": "cce", "activations": "recompute"},
    "nf4, cce, recompute": {"base": "nf4", "loss": "cce", "activations": "recompute"},
    "stored, cce, keep": {"base": None, "loss": "cce", "activations": "keep"},
}
PEERS = {
    "peft float32": {"base": "float32", "checkpoints": False},
    "peft float32, checkpoints": {"base": "float32", "checkpoints": True},
    "peft float32, checkpoints, cut-cross-entropy": {"base": "float32", "checkpoints": True, "cut": True},
    "peft nf4, checkpoints": {"base": "nf4", "checkpoints": True},
    "peft int8 by torchao, checkpoints": {"base": "int8", "checkpoints": True},
}
RATE = 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("name", help="of the record: train/beside_peft_NAME")
    parser.add_argument("--peft-python", required=True)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=parse_bytes, default=700 << 20)
    args = parser.parse_args()
    config = {name: getattr(args, name) for name in ("length", "steps", "threads", "rounds")} | {"rate": RATE}
    card(f"tuning beside PEFT: {args.name}", config)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        batches = _write(args, Path(work))
        common = {"batches": str(batches), "rate": RATE, "threads": args.threads, "adapter": f"{work}/adapter"}
        mine = {**common, "model": args.model}
        _run([sys.executable, HERE / "tuning_worker.py"], {**mine, "begin": True})
        for _ in range(args.rounds):
            for name, settings in OURS.items():
                _take(results, name, _run([sys.executable, HERE / "tuning_worker.py"], {**mine, **settings}))
            for name, settings in PEERS.items():
                found = _run([args.peft_python, HERE / "peft_worker.py"], {**common, "folder": args.folder, **settings})
                _take(results, name, found)
        limited = "inside the cgroup"
        if cgroup_reason() is None:
            command = [sys.executable, str(HERE / "tuning_worker.py")]
            settings = json.dumps({**mine, **OURS["stored, cce, recompute"]})
            done = run_limited([*command, settings], args.memory)
            if done.returncode == 0:
                _take(results, limited, json.loads(done.stdout.splitlines()[-1]))
                results[limited]["cgroup_bytes"] = done.peak_bytes
    save(f"train/beside_peft_{args.name}", {"config": config, "results": results, "claims": _claims(results)}, "torch")


def _write(args: argparse.Namespace, work: Path) -> Path:
    """Documents of equal length, one after the other in the text."""
    with Checkpoint(args.model) as checkpoint:
        ids = load_tokenizer(checkpoint).encode(Path(args.text).read_text("utf-8")[: 12 * args.steps * args.length])
    rows = np.array(ids[: args.steps * args.length], np.int64).reshape(args.steps, args.length)
    labels = np.roll(rows, -1, axis=1)
    labels[:, -1] = NOTHING
    np.savez(work / "batches.npz", ids=rows, labels=labels)
    return work / "batches.npz"


def _run(command: list[Any], settings: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([*map(str, command), json.dumps(settings)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _take(results: dict[str, dict[str, Any]], name: str, found: dict[str, Any]) -> None:
    """Of several rounds the largest peak, each one's seconds a step, and the losses, which are the same."""
    seconds, earlier = statistics.median(found.pop("seconds")[1:]), results.get(name)
    found["last_losses"] = statistics.mean(found["losses"][-5:])
    found["seconds_a_step"] = [seconds]
    if earlier is not None:
        found["seconds_a_step"] = [*earlier["seconds_a_step"], seconds]
        found["peak_bytes"] = max(earlier["peak_bytes"], found["peak_bytes"])
    results[name] = found
    print(
        f"  {name:44s} {found['peak_bytes'] / 2**20:7.0f} MiB  {seconds:6.2f} s a step  "
        f"loss {found['losses'][0]:.4f} -> {found['last_losses']:.4f}",
        flush=True,
    )


def _slower(ours: dict[str, Any], *theirs: dict[str, Any]) -> float:
    """Seconds a step over those of the fastest of others in the same round, median."""
    rounds = zip(ours["seconds_a_step"], *(each["seconds_a_step"] for each in theirs), strict=True)
    return statistics.median(own / min(others) for own, *others in rounds)


def _claims(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    ours, plain = results["stored, cce, recompute"], results["peft float32"]
    peers = [results[name] for name in PEERS if name in results]
    memory = ours["peak_bytes"] / min(p["peak_bytes"] for p in peers)
    best = min(found["last_losses"] for found in peers)
    time = _slower(ours, results["peft float32, checkpoints"])
    kept = results["stored, cce, keep"]
    kept_memory = kept["peak_bytes"] / plain["peak_bytes"]
    kept_time = _slower(kept, *peers)
    apart = max(abs(a - b) for a, b in zip(ours["losses"], plain["losses"], strict=True))
    found = [
        claim("peak over the least of PEFT's", memory, at_most=0.8),
        claim("time of a step over PEFT's with checkpoints", time, at_most=1.0),
        claim("all kept: peak over PEFT's with all kept", kept_memory, at_most=0.8),
        claim("all kept: time of a step over the fastest of PEFT's", kept_time, at_most=1.0),
        claim("last losses less the best of PEFT's, nats", ours["last_losses"] - best, at_most=0.01),
        claim("losses of the same steps, furthest apart from PEFT over float32, nats", apart, at_most=0.01),
    ]  # fmt: skip
    if "inside the cgroup" in results:
        inside = results["inside the cgroup"]["losses"]
        found.append(claim("inside the cgroup: steps done", len(inside), at_least=len(ours["losses"])))
    return found


if __name__ == "__main__":
    main()
