"""GPTQModel's own packers and dequantizers: one file of packed tensors for each case, with what they mean to them.

Argument: settings as JSON: folder. Prints the cases, {name: quantization_config}.
"""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

IN, OUT = 256, 192


def main() -> None:
    folder = Path(json.loads(sys.argv[1])["folder"])
    with contextlib.redirect_stdout(sys.stderr):  # it greets
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    cases = {}
    for method, bits, group, scatter, version in (
        ("gptq", 4, 128, False, "gptq_v2"),
        ("gptq", 4, 32, False, "gptq"),
        ("gptq", 8, 64, False, "gptq_v2"),
        ("gptq", 3, 64, False, "gptq"),
        ("gptq", 2, 32, False, "gptq"),
        ("gptq", 4, 64, True, "gptq"),
        ("awq", 4, 64, False, ""),
    ):
        torch.manual_seed(bits + group)
        linear = torch.nn.Linear(IN, OUT, bias=False)
        linear.weight.data = linear.weight.data.half()
        order = torch.randperm(IN) if scatter else torch.arange(IN)
        g_idx = torch.empty(IN, dtype=torch.int32)
        g_idx[order] = torch.arange(IN, dtype=torch.int32) // group
        grouped = linear.weight.data.float()[:, order].reshape(OUT, -1, group)
        low, high = grouped.amin(2), grouped.amax(2)
        scales = ((high - low) / (2**bits - 1)).half().float()
        zeros = (-low / scales).round().clamp(1, 2**bits - 1)
        made = AwqTorchLinear if method == "awq" else TorchLinear
        module = made(bits=bits, group_size=group, sym=False, desc_act=scatter, in_features=IN, out_features=OUT)
        with contextlib.redirect_stdout(sys.stderr):
            module.pack(linear, scales, zeros, g_idx)
            if method == "gptq":
                module.post_init()
                meant = module.dequantize_weight().T
            else:
                module.post_init()
                meant = module(torch.eye(IN, dtype=torch.float16)).T
            if version == "gptq":
                convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        name = f"{method} {bits} bits, groups of {group}{', scattered' if scatter else ''}{version and ', ' + version}"
        tensors = {"layer.qweight": module.qweight, "layer.scales": module.scales, "layer.qzeros": module.qzeros}
        if scatter:
            tensors["layer.g_idx"] = module.g_idx
        tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
        save_file(tensors | {"meant": meant.float().contiguous()}, folder / f"{len(cases)}.safetensors")
        cases[name] = {"quant_method": method, "bits": bits, "group_size": group, "desc_act": scatter, "sym": False}
        if method == "gptq":
            cases[name]["checkpoint_format"] = version
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
