"""One fresh process of llama.cpp: load, prefill, decode; prints its figures as JSON. Argument: settings as JSON.

Settings: model, prefill, decode, n_threads, context, n_batch, kv (f16, q8_0 or q4_0); or ``logits_of`` (windows of
token ids) and ``out`` to keep the logits of the second halves instead of timing.
"""

import json
import sys
import time

import llama_cpp
import numpy as np

from barefoot.core.measure import peak_resident

KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # numbers of GGML's types


def main() -> None:
    settings = json.loads(sys.argv[1])
    start = time.perf_counter()
    model = llama_cpp.Llama(
        settings["model"],
        n_ctx=settings["context"],
        n_threads=settings["n_threads"],
        n_threads_batch=settings["n_threads"],
        n_batch=settings.get("n_batch", 512),
        n_ubatch=settings.get("n_batch", 512),
        logits_all="logits_of" in settings,
        verbose=False,
        flash_attn=settings.get("flash_attn", True),
        type_k=KV_TYPES[settings.get("kv", "f16")],
        type_v=KV_TYPES[settings.get("kv", "f16")],
    )
    load_s = time.perf_counter() - start
    if "logits_of" in settings:
        halves = []
        for window in settings["logits_of"]:
            model.reset()
            model.eval(window)
            halves.append(model.scores[len(window) // 2 : len(window) - 1].astype(np.float32))
        np.save(settings["out"], np.concatenate(halves))
        print(json.dumps({"n": sum(map(len, halves))}))
        return
    ids = [(7 * i) % 30_000 + 100 for i in range(settings["prefill"])]
    model.eval(ids[:8])
    model.reset()
    start = time.perf_counter()
    model.eval(ids)
    prefill_s = time.perf_counter() - start
    token, start = 200, time.perf_counter()
    for i in range(settings["decode"]):
        model.eval([token])
        token = (token * 31 + i) % 30_000 + 100
    decode_s = time.perf_counter() - start
    print(
        json.dumps(
            {
                "load_s": load_s,
                "prefill_tokens_per_s": settings["prefill"] / prefill_s,
                "decode_tokens_per_s": settings["decode"] / decode_s,
                "peak_mib": peak_resident() / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
