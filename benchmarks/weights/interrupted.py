"""A fit inside a memory cgroup, killed again and again: does it end with the bytes of a fit that nothing disturbed?

    python -m benchmarks weights.interrupted [--memory 1.5GiB] [--shape tinyllama-1.1b] [--kills 10] [--folder DIR]

Writes a GGUF file of random weights, fits it once in peace, and once more with SIGKILL after times drawn at random from
the length of the first fit; then compares every file of the two folders. Needs root for the cgroup.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from barefoot.core.measure import LimitedRun, cgroup_reason, run_limited
from barefoot.core.units import parse_bytes
from benchmarks.harness import card, claim, save
from benchmarks.models.random_llama import SHAPES, write

SEED = 0  # of the times at which it is killed


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="1.5GiB")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--weights", default="int(bits=4,group=64)")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", help="where files are written")
    args = parser.parse_args()
    reason = cgroup_reason()
    if reason is not None:
        sys.exit(f"can't enforce a budget here: {reason}")
    limit = parse_bytes(args.memory)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model, record = Path(folder, "random.gguf"), Path(folder, "fit.json")
        write(str(model), SHAPES[args.shape], "q4_0", seed=0)

        def fit(target: str, seconds: float | None = None) -> LimitedRun:
            command = [sys.executable, "-m", "barefoot", "fit", str(model), "-o", str(Path(folder, target))]
            command += ["--weights", args.weights, "--tokens", str(args.tokens), "--json", str(record)]
            command += ["--fit-memory", args.memory]
            return run_limited(command if seconds is None else ["timeout", "-s", "KILL", str(seconds), *command], limit)

        card(f"fit {args.shape} in {args.memory}", {"kills": args.kills, "weights": args.weights})
        started = time.perf_counter()
        whole = fit("whole")
        seconds = time.perf_counter() - started
        if whole.returncode:
            sys.exit(f"exit {whole.returncode}: {whole.stderr[-500:]}")
        print(f"undisturbed: {seconds:.0f} s, cgroup peak {whole.peak_bytes / 2**20:.0f} MiB", flush=True)
        peaceful = json.loads(record.read_text())
        rng = np.random.default_rng(SEED)
        killed = 0
        for _ in range(args.kills):
            done = fit("killed", float(rng.uniform(0.02, 0.12) * seconds))
            killed += done.killed
            print(
                f"  killed: {done.killed}, files {len(list(Path(folder, 'killed').glob('*.safetensors')))}", flush=True
            )
            if not done.killed:
                break
        last = fit("killed")
        same = digests(Path(folder, "whole")) == digests(Path(folder, "killed"))
        peak = max(whole.peak_bytes, last.peak_bytes)
        save(
            f"weights/interrupted_{args.shape}",
            {
                "config": vars(args) | {"folder": None},
                "card": {"seconds": round(seconds, 1), "files": len(digests(Path(folder, "whole")))},
                "results": {"fit": {k: peaceful[k] for k in ("predicted_peak_bytes", "measured_peak_bytes")}},
                "ratios": {"cgroup peak / limit": round(peak / limit, 3)},
                "claims": [
                    claim("killed so often", killed, at_least=args.kills),
                    claim("files are the same, byte for byte", float(same and last.returncode == 0), at_least=1.0),
                    claim("resident peak over the limit", peaceful["measured_peak_bytes"] / limit, at_most=1.0),
                ],
            },
        )


if __name__ == "__main__":
    main()
