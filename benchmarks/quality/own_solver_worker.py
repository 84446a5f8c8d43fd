"""One matrix solved by one of our solvers, in a fresh process. Argument: settings as JSON.

{"solver", "problem": weight (rows, cols) and inputs (n, cols) in an .npz, "bits", "group", "threads"}. Prints the
seconds that it took to look at inputs and to solve, and the process's peak.
"""

import json
import sys
import time

import numpy as np

from barefoot import ops
from barefoot.core.measure import peak_resident
from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.engine.calibration import measure
from barefoot.ops import blocks
from barefoot.weights.solvers import Solver


def main() -> None:
    settings = json.loads(sys.argv[1])
    ops.set_threads(settings["threads"])
    (solver,) = parse_composition(settings["solver"], techniques("weights.solvers"), "weights.solvers")
    assert isinstance(solver, Solver)
    grid = blocks.lookup(f"int{settings['bits']}_g{settings['group']}_asym").grid
    assert grid is not None
    with np.load(settings["problem"]) as problem:
        weight, inputs = problem["weight"], problem["inputs"]
    start = time.perf_counter()
    seen = measure(np.array_split(inputs, max(1, len(inputs) // 512)), solver.wants)
    looked = time.perf_counter()
    solver.solve(weight, grid, seen)
    seconds = {"inputs_s": looked - start, "solve_s": time.perf_counter() - looked}
    print(json.dumps(seconds | {"peak_mib": (peak_resident() or 0) / 2**20}))


if __name__ == "__main__":
    main()
