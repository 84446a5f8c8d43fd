"""Requantize a GGUF file with llama.cpp: one fresh process of the peer.

Argument, as JSON: {"source", "to", "type"} and perhaps "imatrix", an npz file of the mean squares of each matrix's
inputs by the tensor's name: what its importance matrices hold.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np

TYPES = {  # numbers of llama.cpp's file types
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "q2_k_s": 21,
    "iq4_nl": 25,
    "iq3_s": 26,
    "iq3_m": 27,
    "iq2_s": 28,
    "iq2_m": 29,
    "iq4_xs": 30,
    "tq2_0": 37,
}


def main() -> None:
    settings = json.loads(sys.argv[1])
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = TYPES[settings["type"]], True
    if "imatrix" in settings:
        squares = {name: np.ascontiguousarray(v, np.float32) for name, v in np.load(settings["imatrix"]).items()}
        entries = (llama_cpp.llama_model_imatrix_data * (len(squares) + 1))()  # a null name ends it
        for entry, (name, values) in zip(entries, squares.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if llama_cpp.llama_model_quantize(settings["source"].encode(), settings["to"].encode(), params):
        raise RuntimeError("llama.cpp could not quantize the file")
    print("{}")


if __name__ == "__main__":
    main()
