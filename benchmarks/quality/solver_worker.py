"""One matrix quantized by another package, in a fresh process. Argument: settings as JSON.

{"peer": "gptqmodel" or "hqq", "problem": weight (rows, cols) and inputs (n, cols) in an .npz, "bits", "group", "out",
"threads"}: what is stored goes to ``out`` as float32. Prints the seconds that it took to look at inputs and to solve.
"""

import contextlib
import json
import sys
import time

import numpy as np
import torch


def by_gptqmodel(
    weight: torch.Tensor, inputs: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, dict[str, float]]:
    with contextlib.redirect_stdout(sys.stderr):  # it greets
        from gptqmodel.quantization import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    config = QuantizeConfig(bits=bits, group_size=group, sym=False, desc_act=False)
    job = GPTQ(linear, config)
    job.quantizer.configure(perchannel=True)
    start = time.perf_counter()
    for i, window in enumerate(inputs.split(512)):
        job.add_batch(window[None], linear(window[None]), i)
    looked = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        stored, *_ = job.quantize()
    return stored.float(), {"inputs_s": looked - start, "solve_s": time.perf_counter() - looked}


def by_hqq(weight: torch.Tensor, inputs: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, dict[str, float]]:
    from hqq.core.quantize import Quantizer

    start = time.perf_counter()
    knobs = {"nbits": bits, "group_size": group, "channel_wise": True, "optimize": True, "axis": 1, "device": "cpu"}
    codes, meta = Quantizer.quantize(weight, compute_dtype=torch.float32, **knobs)
    seconds = time.perf_counter() - start
    return Quantizer.dequantize(codes, meta).reshape(weight.shape).float(), {"inputs_s": 0.0, "solve_s": seconds}


PEERS = {"gptqmodel": by_gptqmodel, "hqq": by_hqq}


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings.get("threads", torch.get_num_threads()))
    with np.load(settings["problem"]) as problem:
        weight, inputs = (torch.from_numpy(problem[name]) for name in ("weight", "inputs"))
    with torch.no_grad():
        stored, seconds = PEERS[settings["peer"]](weight, inputs, settings["bits"], settings["group"])
    np.save(settings["out"], stored.numpy())
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
