"""Text behind prompts in transformers' QuantizedCache: one fresh process of the peer. Argument: JSON.

{"folder", "texts", "prompt", "arms", "threads"}: "texts" is a file of lists of token ids, of which the first "prompt"
are a prompt; "arms" are the cache's arguments by name, "backend" among them. The last line is {"nll", "versions"}, nats
of the tokens behind the first one after the prompt, fed one by one, for each arm and for the "full" cache; or
{"refused"}, what the cache says of the model.
"""

import contextlib
import importlib.metadata
import json
import sys
from pathlib import Path

import torch

with contextlib.redirect_stdout(sys.stderr):
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, QuantizedCache


def nll(model, cache, ids, n_prompt):
    model(torch.tensor([ids[:n_prompt]]), past_key_values=cache, logits_to_keep=1)
    total = 0.0
    for token, following in zip(ids[n_prompt:-1], ids[n_prompt + 1 :], strict=True):
        logits = model(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1).logits
        total -= float(logits[0, -1].double().log_softmax(-1)[following])
    return total / (len(ids) - 1 - n_prompt)


def main():
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    config = AutoConfig.from_pretrained(settings["folder"])
    if hasattr(config, "quantization_config"):  # a folder of floats may name what wrote it
        del config.quantization_config
    makers = {"full": DynamicCache}
    for name, arm in settings["arms"].items():
        makers[name] = lambda arm=arm: QuantizedCache(config=config, **arm)
    try:
        for make in makers.values():
            make()
    except (ImportError, ValueError) as error:
        print(json.dumps({"refused": str(error)}))
        return
    model = AutoModelForCausalLM.from_pretrained(settings["folder"], config=config, dtype=torch.float32).eval()
    texts, found = json.loads(Path(settings["texts"]).read_text()), {}
    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):  # a backend may compile, and say so
        for name, make in makers.items():
            each = [nll(model, make(), ids, settings["prompt"]) for ids in texts]
            found[name] = sum(each) / len(each)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "optimum-quanto")}
    print(json.dumps({"nll": found, "versions": versions}))


if __name__ == "__main__":
    main()
