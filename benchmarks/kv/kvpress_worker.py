"""Contexts compressed by kvpress's own presses: one fresh process of the peer. Argument: JSON.

{"folder", "tasks", "out", "press", "knobs", "keep", "threads"}: "tasks" is a file of {task: [{"prompt", "turns":
[{"then", "fed"}]}]}. A prompt passes with the press, which leaves ``keep`` entries of each key head (without "keep" it
is a press of channels; without "press" all stays); then each turn goes on from there, "then" at once and "fed" one by
one. The log-probabilities behind "then" and behind each of "fed" go to files "task-number.npy" of the folder "out",
float16. Bytes are those of the storages of the cache's tensors.
"""

import contextlib
import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

with contextlib.redirect_stdout(sys.stderr):
    import kvpress
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache


def load(folder, eager):
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):  # a folder of floats may name what wrote it
        del config.quantization_config
    how = "eager" if eager else "sdpa"
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation=how
    ).eval()


def held(cache):
    storages = (part.untyped_storage() for layer in cache.layers for part in (layer.keys, layer.values))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def press_of(settings, n_prompt):
    if settings["press"] is None:
        return contextlib.nullcontext
    knobs = dict(settings["knobs"])
    if settings["keep"] is not None:  # a share, of which the whole part is taken
        knobs["compression_ratio"] = 1 - (settings["keep"] + 0.5) / n_prompt
    return getattr(kvpress, settings["press"])(**knobs)


class Run:
    def __init__(self, model, settings):
        self.model, self.settings = model, settings
        self.behind_prompt = self.most = self.n_decoded = 0
        self.seconds = 0.0

    @property
    def facts(self):
        return {
            "bytes_behind_prompt": self.behind_prompt,
            "most_bytes": self.most,
            "decode_ms": 1000 * self.seconds / self.n_decoded,
        }

    def prompt(self, ids):
        cache = DynamicCache()
        press = press_of(self.settings, len(ids))
        with press(self.model) if self.settings["press"] else contextlib.nullcontext():
            self.model(
                torch.tensor([ids]), past_key_values=cache, logits_to_keep=1, cache_position=torch.arange(len(ids))
            )
        self.behind_prompt = max(self.behind_prompt, held(cache))
        return cache

    def turn(self, cache, n_before, turn):
        """Rows of log-probabilities; positions go on counting what the press took."""
        rows, position = [], n_before
        if turn["then"]:
            rows.append(self._pass(cache, turn["then"], position))
            position += len(turn["then"])
        started = time.perf_counter()
        for token in turn["fed"]:
            rows.append(self._pass(cache, [token], position))
            position += 1
        self.seconds += time.perf_counter() - started
        self.n_decoded += len(turn["fed"])
        self.most = max(self.most, held(cache))
        return rows

    def _pass(self, cache, ids, position):
        there = torch.arange(position, position + len(ids))[None]
        logits = self.model(torch.tensor([ids]), past_key_values=cache, position_ids=there, logits_to_keep=1).logits
        found = logits[0, -1].double().log_softmax(-1)
        return found.clamp(min=float(np.finfo(np.float16).min)).half().numpy()


def main():
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    model = load(settings["folder"], settings["press"] == "ObservedAttentionPress")
    facts = {}
    with torch.inference_mode():
        for task, groups in json.loads(Path(settings["tasks"]).read_text()).items():
            run = Run(model, settings)
            for number, group in enumerate(groups):
                cache, rows = run.prompt(group["prompt"]), []
                for turn in group["turns"]:
                    rows += run.turn(copy.deepcopy(cache), len(group["prompt"]), turn)
                np.save(Path(settings["out"]) / f"{task}-{number}.npy", np.array(rows))
            facts[task] = run.facts
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
