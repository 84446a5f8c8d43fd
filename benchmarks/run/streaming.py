"""A model three times its budget, streamed from disk inside a memory cgroup: does it fit, and at the predicted speed?

    python -m benchmarks.run.streaming [--memory 192MiB] [--shape tinyllama-1.1b] [--rounds 5] [--folder DIR]

Writes a GGUF file of random weights (about 620 MB for the default shape at 4 bits), probes the machine, and runs
``barefoot run`` in fresh processes inside a cgroup of the stated size. Needs root for the cgroup.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from barefoot.core.measure import cgroup_reason, run_limited
from barefoot.core.units import parse_bytes
from benchmarks.harness import card, claim, rounds, save
from benchmarks.models.random_llama import SHAPES, write

METRICS = (
    "decode_tokens_per_second",
    "predicted_decode_tokens_per_second",
    "measured_peak_bytes",
    "predicted_peak_bytes",
    "unaccounted_bytes",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="192MiB")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--folder", help="where the file is written; on the disk whose speed matters")
    args = parser.parse_args()
    reason = cgroup_reason()
    if reason is not None:
        sys.exit(f"can't enforce a budget here: {reason}")
    limit = parse_bytes(args.memory)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model, out = Path(folder, "random.gguf"), Path(folder, "out.json")
        write(str(model), SHAPES[args.shape], "q4_0", seed=0)
        os.sync()
        subprocess.run([sys.executable, "-m", "barefoot", "doctor", "--refresh"], check=True, capture_output=True)
        command = [sys.executable, "-m", "barefoot", "run", str(model), "hello", "--memory", args.memory]
        command += ["--context", "512", "--max-tokens", str(args.tokens), "--json", str(out)]
        facts = {"weights / budget": round(model.stat().st_size / limit, 2), "file MB": model.stat().st_size // 10**6}
        card(f"streaming {args.shape} in {args.memory}", facts)

        def once() -> dict[str, float]:
            done = run_limited(command, limit)
            if done.returncode:
                raise RuntimeError(f"exit {done.returncode}: {done.stderr[-500:]}")
            record = json.loads(out.read_text())
            return {name: record[name] for name in METRICS} | {"cgroup_peak_bytes": done.peak_bytes}

        results = rounds({"barefoot": once}, args.rounds)
    medians = {name: values["median"] for name, values in results["barefoot"].items()}
    speed = medians["decode_tokens_per_second"] / medians["predicted_decode_tokens_per_second"]
    gap = abs(medians["unaccounted_bytes"]) / medians["predicted_peak_bytes"]
    peak = results["barefoot"]["measured_peak_bytes"]["max"] / limit
    save(
        f"run/streaming_{args.shape}",
        {
            "config": {"memory": args.memory, "shape": args.shape, "tokens": args.tokens, "type": "q4_0"},
            "card": facts,
            "results": results,
            "ratios": {"measured / predicted tokens per second": round(speed, 3)},
            "claims": [
                claim("weights over budget", facts["weights / budget"], at_least=3.0),
                claim("measured over predicted decode speed", speed, at_least=0.7, at_most=1.3),
                claim("peak resident over budget, worst run", peak, at_most=1.0),
                claim("|unaccounted| over predicted", gap, at_most=0.05),
            ],
        },
    )


if __name__ == "__main__":
    main()
