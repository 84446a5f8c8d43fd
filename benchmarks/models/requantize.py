"""Requantize a GGUF file with llama.cpp: one fresh process of the peer. Argument: {"source", "to", "type"} as JSON."""

import json
import sys

import llama_cpp

TYPES = {"q4_0": 2, "q8_0": 7, "q2_k": 10, "tq2_0": 37}  # numbers of llama.cpp's file types


def main() -> None:
    settings = json.loads(sys.argv[1])
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = TYPES[settings["type"]], True
    if llama_cpp.llama_model_quantize(settings["source"].encode(), settings["to"].encode(), params):
        raise RuntimeError("llama.cpp could not quantize the file")
    print("{}")


if __name__ == "__main__":
    main()
