"""One fresh process of barefoot that decodes sequences together; prints its figures as JSON.

Argument: settings as JSON. They are model, batches (numbers of sequences; as many as the largest are held), prefill and
decode (tokens of each), n_threads, context (of each), kv (a spec string), activations.
"""

import json
import sys
import time

from barefoot.core.measure import peak_resident
from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint


def main() -> None:
    settings = json.loads(sys.argv[1])
    n_sequences, n_prompt = max(settings["batches"]), settings["prefill"]
    config = EngineConfig(
        context=settings["context"],
        kv=parse_composition(settings["kv"], techniques("kv.stores"), "kv")[0],
        chunk=min(128, settings["context"]),
        n_threads=settings["n_threads"],
        n_sequences=n_sequences,
        activations=settings.get("activations", "int8"),
    )
    with Checkpoint(settings["model"]) as checkpoint:
        engine = Engine(checkpoint, model_spec(checkpoint), config)
    for sequence in range(n_sequences):
        engine.prefill([(7 * i + sequence) % 30_000 + 100 for i in range(n_prompt)], sequence=sequence)
    figures = {}
    for n in settings["batches"]:
        for sequence in range(n_sequences):
            engine.truncate(n_prompt, sequence)
        start = time.perf_counter()
        for step in range(settings["decode"]):
            engine.decode_batch({sequence: (31 * step + sequence) % 30_000 + 100 for sequence in range(n)})
        figures[f"batch_{n}_tokens_per_s"] = n * settings["decode"] / (time.perf_counter() - start)
    print(json.dumps(figures | {"peak_mib": (peak_resident() or 0) / 2**20}))


if __name__ == "__main__":
    main()
