"""One fresh process of PEFT: adapters over a transformers model, the given micro-batches; prints its figures as JSON.

Argument: settings as JSON: ``folder``, ``adapter`` (a folder of PEFT with the first values), ``batches`` (an .npz of
int64 ids and labels, a document a row), ``rate``, ``base`` ("float32", bitsandbytes' "nf4" or torchao's "int8"),
``checkpoints``, ``threads``, ``cut`` (the loss by cut-cross-entropy, in the form that runs without a GPU).
"""

import json
import resource
import sys
import time

import numpy as np
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def _loss(model: PeftModel, ids: torch.Tensor, labels: torch.Tensor, *, cut: bool) -> torch.Tensor:
    if not cut:
        return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0], labels)
    from cut_cross_entropy import linear_cross_entropy

    decoder = model.get_base_model()
    hidden = decoder.model(input_ids=ids).last_hidden_state[0]
    loss: torch.Tensor = linear_cross_entropy(hidden, decoder.lm_head.weight, labels, impl="torch_compile")
    return loss


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    quantized = {}
    if settings["base"] == "nf4":
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    elif settings["base"] == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        quantized["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=torch.float32, **quantized)
    if settings["base"] == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings["checkpoints"])
    elif settings["checkpoints"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    model = PeftModel.from_pretrained(model, settings["adapter"], is_trainable=True).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings["rate"], weight_decay=0.0, foreach=False)
    data = np.load(settings["batches"])
    losses, seconds = [], []
    for ids, labels in zip(data["ids"], data["labels"], strict=True):
        started = time.perf_counter()
        loss = _loss(model, torch.from_numpy(ids[None]), torch.from_numpy(labels), cut=settings.get("cut", False))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"losses": losses, "seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
