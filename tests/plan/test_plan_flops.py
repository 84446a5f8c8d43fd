"""Operations of all matrix products, against PyTorch's own counter on a tiny model with grouped heads."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from barefoot.engine.config import EngineConfig  # noqa: E402
from barefoot.engine.specs import spec_from_config  # noqa: E402
from barefoot.kv.stores.f16 import HalfStore  # noqa: E402
from barefoot.plan.operators import Site, table  # noqa: E402

SHAPES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("tied", [True, False])
def test_matrix_products_are_those_that_torch_counts(tied):
    shapes = {**SHAPES, "tie_word_embeddings": tied}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shapes, attn_implementation="eager")).eval()
    n = 20
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros((1, n), dtype=torch.long), use_cache=False, logits_to_keep=1)
    flops = counter.get_flop_counts()["Global"]
    counted = {str(op): count for op, count in flops.items()}

    spec = spec_from_config({"model_type": "llama", **shapes}, "tiny")
    rows = table(spec, EngineConfig(n, HalfStore()), Site(), n=n, past=0)
    products = {"q", "k", "v", "o", "gate", "up", "down", "head"}
    assert sum(op.ops * c for _, op, c in rows if op.name in products) == counted["aten.mm"]
    # torch attends to the whole square of positions, we to the causal half with its diagonal
    assert counted["aten.bmm"] == 3 * 6 * 4 * 32 * n * n
    causal = sum(op.ops * c for _, op, c in rows if op.name == "attention")
    assert causal == 3 * 6 * (4 * 32 + 5) * n * (n + 1) // 2
