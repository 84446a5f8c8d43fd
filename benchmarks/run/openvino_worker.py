"""One fresh process of OpenVINO GenAI: load, prefill, decode; prints its figures as JSON. Argument: settings as JSON.

Settings: model (a GGUF file), prefill, decode, n_threads. A first prompt with other tokens warms it up: its prefix
cache would answer a repeated one for nothing.
"""

import json
import sys
import time

import numpy as np
import openvino
import openvino_genai

from barefoot.core.measure import peak_resident


def inputs(n: int, step: int) -> openvino_genai.TokenizedInputs:
    ids = np.array([[(step * i) % 30_000 + 100 for i in range(n)]], np.int64)
    return openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))


def main() -> None:
    settings = json.loads(sys.argv[1])
    start = time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(settings["model"], "CPU", INFERENCE_NUM_THREADS=settings["n_threads"])
    load_s = time.perf_counter() - start
    config = openvino_genai.GenerationConfig()
    config.ignore_eos = True
    config.do_sample = False
    config.max_new_tokens = 4
    pipeline.generate(inputs(settings["prefill"], 11), config)
    config.max_new_tokens = settings["decode"] + 1
    metrics = pipeline.generate(inputs(settings["prefill"], 7), config).perf_metrics
    print(
        json.dumps(
            {
                "load_s": load_s,
                "prefill_tokens_per_s": 1e3 * settings["prefill"] / metrics.get_ttft().mean,
                "decode_tokens_per_s": 1e3 / metrics.get_tpot().mean,
                "peak_mib": (peak_resident() or 0) / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
