"""transformers' own loader on a folder: its weights, dequantized, as f32 tensors in one safetensors file.

Argument: settings as JSON: model, out. Prints the class of the layers' matrices.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def main() -> None:
    settings = json.loads(sys.argv[1])
    config = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32, quantization_config=config)
    found = {name: value.detach().float().contiguous() for name, value in model.state_dict().items()}
    kept = {name: value for name, value in found.items() if name.endswith("proj.weight")}
    save_file(kept, settings["out"])
    print(json.dumps({"n": len(kept), "class": type(model.model.layers[0].mlp.up_proj).__name__}))


if __name__ == "__main__":
    main()
