"""One fresh process of llama.cpp that decodes sequences together; prints its figures as JSON.

Argument: settings as JSON. They are those of barefoot_batch_worker.py; ``kv`` is f16, q8_0 or q4_0. Every sequence
has a stream of its own in the KV cache, so that none is masked out of another's attention, and logits are made only of
the tokens that are decoded.
"""

import json
import sys
import time
from collections.abc import Sequence

import llama_cpp as llama

from barefoot.core.measure import peak_resident

KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # numbers of GGML's types
BATCH_TOKENS = 512


@llama.llama_log_callback
def say_nothing(level, text, data):  # a name of the module, since llama.cpp holds only its address
    pass


def open_context(settings: dict, n_sequences: int):
    """The model and a context of ``n_sequences`` streams; they live until the process ends."""
    model = llama.llama_model_load_from_file(settings["model"].encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx = settings["context"] * n_sequences
    params.n_seq_max = n_sequences
    params.n_batch = params.n_ubatch = BATCH_TOKENS
    params.n_threads = params.n_threads_batch = settings["n_threads"]
    params.type_k = params.type_v = KV_TYPES[settings["kv"]]
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.kv_unified = False
    context = llama.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp could not make the context")
    return context


def decode(context, batch, tokens: Sequence[tuple[int, int, int]], *, logits: bool) -> None:
    """Pass (token, position, sequence) through the model; logits of all of them, or of the last one."""
    batch.n_tokens = len(tokens)
    for i, (token, position, sequence) in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, position
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.logits[i] = logits or i + 1 == len(tokens)
    if llama.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    llama.llama_synchronize(context)


def main() -> None:
    settings = json.loads(sys.argv[1])
    n_sequences, n_prompt = max(settings["batches"]), settings["prefill"]
    llama.llama_log_set(say_nothing, None)
    llama.llama_backend_init()
    context = open_context(settings, n_sequences)
    memory, batch = llama.llama_get_memory(context), llama.llama_batch_init(BATCH_TOKENS, 0, 1)
    for sequence in range(n_sequences):
        prompt = [((7 * i + sequence) % 30_000 + 100, i, sequence) for i in range(n_prompt)]
        for start in range(0, n_prompt, BATCH_TOKENS):
            decode(context, batch, prompt[start : start + BATCH_TOKENS], logits=False)
    figures = {}
    for n in settings["batches"]:
        for sequence in range(n_sequences):
            llama.llama_memory_seq_rm(memory, sequence, n_prompt, -1)
        start_time = time.perf_counter()
        for step in range(settings["decode"]):
            tokens = [((31 * step + sequence) % 30_000 + 100, n_prompt + step, sequence) for sequence in range(n)]
            decode(context, batch, tokens, logits=True)
        figures[f"batch_{n}_tokens_per_s"] = n * settings["decode"] / (time.perf_counter() - start_time)
    print(json.dumps(figures | {"peak_mib": (peak_resident() or 0) / 2**20}))


if __name__ == "__main__":
    main()
