"""One fresh process of barefoot: the same as peft_worker.py, over the base as it is stored or in another format.

Argument: settings as JSON: ``model``, ``adapter`` (a folder to write the first values to), ``batches``, ``rate``,
``base`` (a spec of --weights, or null), ``activations``, ``loss``, ``threads``; with ``begin`` the first values are
written, and nothing is trained.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from barefoot.adapters.lora import LoRA
from barefoot.cli.commands.tune import AT_ONCE
from barefoot.core.measure import peak_resident, return_freed_memory
from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.engine.adapter_files import save_adapter
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.plan.job import parse_weights
from barefoot.train import MicroBatch


def main() -> None:
    settings = json.loads(sys.argv[1])
    return_freed_memory(AT_ONCE)
    from barefoot.train.driver.decoder import Decoder
    from barefoot.train.driver.loop import Settings, Trainer
    from barefoot.train.driver.warm_up import warm_up

    warm_up(settings["threads"])
    formats = parse_weights(settings["base"]) if settings.get("base") else {}
    formats = {group: found for group, found in formats.items() if group in ("attn", "ffn")}
    adapter = LoRA()
    with Checkpoint(settings["model"]) as checkpoint:
        spec = model_spec(checkpoint)
        decoder = Decoder(
            checkpoint, spec, adapter, formats=formats, activations=settings.get("activations", "recompute")
        )
    if settings.get("begin"):
        save_adapter(settings["adapter"], spec, decoder.pairs())
        print("{}")
        return
    (loss,) = parse_composition(settings["loss"], techniques("train.losses"), "train.losses")
    data = np.load(settings["batches"])
    rows = iter(zip(data["ids"], data["labels"], strict=True))

    class Data:
        @property
        def place(self) -> dict[str, int]:
            return {}

        def step(self) -> list[MicroBatch]:
            ids, labels = next(rows)
            return [MicroBatch(ids, labels, (len(ids),))]

    with tempfile.TemporaryDirectory() as folder:
        run = Settings(len(data["ids"]), lambda step: settings["rate"], save_every=0)
        steps = list(Trainer(decoder, loss, run, "benchmark", Path(folder)).run(Data()))
    losses, seconds = [s.loss for s in steps], [s.seconds for s in steps]
    print(json.dumps({"losses": losses, "seconds": seconds, "peak_bytes": peak_resident()}))


if __name__ == "__main__":
    main()
