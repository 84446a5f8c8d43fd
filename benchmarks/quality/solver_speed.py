"""How long a solve takes: our solvers beside gptqmodel's GPTQ and HQQ on the same matrices, inputs and threads.

    python -m benchmarks quality.solver_speed --work DIR [--gptq-python PYTHON] [--hqq-python PYTHON] [--threads 2]
        [--shapes 2048x2048 5632x2048 2048x5632] [--tokens 16384] [--rounds 3]

Random weights and inputs of the shapes of a 1.1B model; seconds don't depend on them. "inputs": what is done with the
inputs before anything is solved (the Hessian). "solve": all that follows, the factor included. Every measurement is a
fresh process; HQQ looks at no inputs, and stands beside our solver that doesn't either. Peers quantize to 4 bits with
groups of 64, a scale and a zero point each, as ours do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.harness import card, child, claim, read_bandwidth, rounds, save

HERE = Path(__file__).parent
OURS = ("gptq(sweeps=0)", "gptq", "hqq", "mse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--gptq-python")
    parser.add_argument("--hqq-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "5632x2048", "2048x5632"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    settings = {"shapes": args.shapes, "tokens": args.tokens, "threads": args.threads, "format": "int4_g64_asym"}
    card("seconds of a solve", settings | {"read bandwidth GB/s": read_bandwidth(args.threads)})
    results, ratios = {}, {}
    for shape in args.shapes:
        rows, cols = map(int, shape.split("x"))
        problem = work / f"{shape}.npz"
        inputs = rng.standard_normal((args.tokens, cols), np.float32)
        np.savez(problem, weight=rng.standard_normal((rows, cols), np.float32) / np.float32(cols**0.5), inputs=inputs)
        common = {"problem": str(problem), "bits": 4, "group": 64, "threads": args.threads}
        contenders = {
            name: lambda name=name, common=common: child(HERE / "own_solver_worker.py", common | {"solver": name})
            for name in OURS
        }
        for peer, python in (("gptqmodel", args.gptq_python), ("hqq", args.hqq_python)):
            if python:
                told = common | {"peer": peer, "out": str(work / "stored.npy")}
                contenders[f"{peer} package"] = lambda told=told, python=python: child(
                    HERE / "solver_worker.py", told, python
                )
        results[shape] = rounds(contenders, args.rounds, warmup=0)
        for ours, peer in (
            ("gptq(sweeps=0)", "gptqmodel package"),
            ("gptq", "gptqmodel package"),
            ("hqq", "hqq package"),
        ):
            if peer in results[shape]:
                for metric in ("inputs_s", "solve_s"):
                    there = results[shape][peer][metric]["median"]
                    if there:
                        key = f"{shape} {metric}: {peer} / {ours}"
                        ratios[key] = round(there / results[shape][ours][metric]["median"], 2)
    claims = [claim(f"times as fast, {key}", value, at_least=1.0) for key, value in ratios.items() if " solve_s" in key]
    save("quality/solver_speed", {"config": settings, "results": results, "ratios": ratios, "claims": claims})


if __name__ == "__main__":
    main()
