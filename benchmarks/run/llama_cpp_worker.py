"""One fresh process of llama.cpp: load, prefill, decode; prints its figures as JSON. Argument: settings as JSON.

Settings: model, prefill, decode, n_threads, context, n_batch, kv (f16, q8_0 or q4_0), flash_attn (by default only
where quantized values need it: it costs decoding on CPU speed); or ``logits_of`` (windows of
token ids) and ``out`` to keep the logits of the second halves instead of timing; or ``first_token_of``, a text: its
first token and nothing else. Timing calls ``llama_decode`` itself: what the Python binding adds to it is not counted.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np

from barefoot.core.measure import peak_resident

KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # numbers of GGML's types


def evaluate(model: llama_cpp.Llama, ids: list[int], n_batch: int) -> None:
    """Append ``ids``; logits of the last one."""
    for start in range(0, len(ids), n_batch):
        part = ids[start : start + n_batch]
        tokens = (ctypes.c_int32 * len(part))(*part)  # held until the call is over: the batch only points to it
        if llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(tokens, len(part))):
            raise RuntimeError("llama_decode failed")
    llama_cpp.llama_synchronize(model.ctx)


def forget(model: llama_cpp.Llama) -> None:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), False)


def main() -> None:
    settings = json.loads(sys.argv[1])
    n_batch = settings.get("n_batch", 512)
    start = time.perf_counter()
    model = llama_cpp.Llama(
        settings["model"],
        n_ctx=settings["context"],
        n_threads=settings["n_threads"],
        n_threads_batch=settings["n_threads"],
        n_batch=n_batch,
        n_ubatch=n_batch,
        logits_all="logits_of" in settings,
        verbose=False,
        flash_attn=settings.get("flash_attn", settings.get("kv", "f16") != "f16"),
        type_k=KV_TYPES[settings.get("kv", "f16")],
        type_v=KV_TYPES[settings.get("kv", "f16")],
    )
    load_s = time.perf_counter() - start
    if "first_token_of" in settings:
        model.create_completion(settings["first_token_of"], max_tokens=1, temperature=0.0)
        print("{}")
        return
    if "logits_of" in settings:
        halves = []
        for window in settings["logits_of"]:
            model.reset()
            model.eval(window)
            halves.append(model.scores[len(window) // 2 : len(window) - 1].astype(np.float32))
        np.save(settings["out"], np.concatenate(halves))
        print(json.dumps({"n": sum(map(len, halves))}))
        return
    n_vocab = model.n_vocab()
    ids = [(7 * i) % (n_vocab - 200) + 100 for i in range(settings["prefill"])]
    evaluate(model, ids[:8], n_batch)
    forget(model)
    start = time.perf_counter()
    evaluate(model, ids, n_batch)
    prefill_s = time.perf_counter() - start
    token, start = 200, time.perf_counter()
    for i in range(settings["decode"]):
        evaluate(model, [token], n_batch)
        token = (token * 31 + i) % (n_vocab - 200) + 100
    decode_s = time.perf_counter() - start
    print(
        json.dumps(
            {
                "load_s": load_s,
                "prefill_tokens_per_s": settings["prefill"] / prefill_s,
                "decode_tokens_per_s": settings["decode"] / decode_s,
                "peak_mib": (peak_resident() or 0) / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
