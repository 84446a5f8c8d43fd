"""Quantize a folder of floats with GPTQModel's own solver: one fresh process of the peer. Argument: JSON.

{"source", "to", "layers", "texts", "bits", "group", "embed_bits"}: the matrices of each layer in the order of a pass
(q k v, o, gate up, down), with the inputs that ``texts`` make behind all that is quantized already, as GPTQModel does
it (true_sequential), each in groups with a zero point; all else as its QuantizeConfig has it. It leaves embeddings as
they are; here they are rounded to the nearest level of their groups' ranges. Bytes are those of codes, and for each
group of a scale in f16 and a zero point of as many bits as a code. Layers are kept in the folder "layers", for other
embeddings beside them.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
AT_ONCE = 4  # windows


def size(weight: torch.Tensor, bits: int, group: int) -> int:
    return weight.numel() * bits // 8 + weight.numel() // group * (16 + bits) // 8


def nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    x = weight.reshape(-1, group)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    zero = (-low / scale).round()
    return ((((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale).reshape(weight.shape)


class Left(Exception):
    """A pass ends where all that was wanted is seen."""


def solved(source: Path, texts: torch.Tensor, bits: int, group: int) -> dict[str, torch.Tensor]:
    """All matrices of the layers, by name."""
    with contextlib.redirect_stdout(sys.stderr):  # they greet
        from gptqmodel.quantization import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ
        from transformers import AutoConfig, AutoModelForCausalLM
    content = json.loads((source / "config.json").read_text())
    content.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content), dtype=torch.float32)
    for path in source.glob("*.safetensors"):
        model.load_state_dict(load_file(path), strict=False)
    model.tie_weights()
    model.eval()
    found = {}
    for number, layer in enumerate(model.model.layers):
        entered = []  # what enters the layer, with the arguments that the model hands on

        def keep(_, args, kwargs, entered=entered):
            entered.append((args, kwargs))
            raise Left

        hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
        for windows in texts.split(AT_ONCE):
            with torch.no_grad(), contextlib.suppress(Left):
                model(windows, use_cache=False)
        hook.remove()
        for stage in STAGES:
            jobs, hooks = {}, []
            for role in stage:
                module = layer.get_submodule(role)
                job = GPTQ(module, QuantizeConfig(bits=bits, group_size=group, sym=False, offload_to_disk=False))
                job.quantizer.configure(perchannel=True)
                jobs[role] = job
                hooks.append(
                    module.register_forward_hook(lambda _, x, y, job=job: job.add_batch(x[0].detach(), y.detach()))
                )
            with torch.no_grad():
                for args, kwargs in entered:
                    layer(*args, **kwargs)
            for hook in hooks:
                hook.remove()
            for role, job in jobs.items():
                module = layer.get_submodule(role)
                with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
                    module.weight.copy_(job.quantize()[0].float())
                found[f"model.layers.{number}.{role}.weight"] = module.weight.detach().clone()
    return found


def main() -> None:
    settings = json.loads(sys.argv[1])
    source, target, bits, group = Path(settings["source"]), Path(settings["to"]), settings["bits"], settings["group"]
    kept = Path(settings["layers"]) / f"gptq-{bits}-{group}.safetensors"
    if not kept.is_file():
        save_file(solved(source, torch.from_numpy(np.load(settings["texts"])).long(), bits, group), kept)
    stored = load_file(kept)
    n_bytes = sum(size(weight, bits, group) for weight in stored.values())
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in sorted(source.glob("*.safetensors")):
        tensors = {name: stored.get(name, tensor) for name, tensor in load_file(path).items()}
        for name, tensor in tensors.items():
            if "embed_tokens" in name or "lm_head" in name:
                tensors[name] = nearest(tensor, settings["embed_bits"], group)
                n_bytes += size(tensor, settings["embed_bits"], group)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / path.name)
    print(json.dumps({"n_bytes": n_bytes}))


if __name__ == "__main__":
    main()
