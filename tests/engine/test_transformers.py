"""barefoot's folders in transformers: the same logits as the engine's, in the stored bytes."""

import numpy as np
import pytest
import tiny
from folders import fitted, logits, save, values

torch = pytest.importorskip("torch", reason="transformers needs torch")
transformers = pytest.importorskip("transformers", reason="the seam is that of transformers")

from barefoot.core.errors import CorruptFile  # noqa: E402
from barefoot.ops import blocks  # noqa: E402
from barefoot.transformers import weights  # noqa: E402
from barefoot.weights.module import PackedEmbedding, PackedLinear  # noqa: E402

IDS = np.random.default_rng(9).integers(0, 97, 30).tolist()
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(params=["llama", "llama-gqa-4-1", "qwen2", "gemma3", "phi3"])
def folder(request, tmp_path, tiny_gguf, monkeypatch):
    """A fitted folder: embeddings of 8 bits, layers of 4 and 3."""
    config, model, settings = tiny.MODELS[request.param]
    monkeypatch.setitem(tiny.MODELS, request.param, (config, model, settings | WIDE))
    save(tiny.build(request.param), tmp_path / "hf", tiny_gguf)
    weights = "embed=int(bits=8,symmetric=true) head=int attn=int(bits=4) ffn=int(bits=3)"
    fitted(tmp_path / "hf", tmp_path / "fitted", weights)
    return tmp_path / "fitted"


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_logits_are_those_of_the_engine(folder):
    expected = logits(folder, IDS)
    assert np.abs(tiny.expected(load(folder), IDS) - expected).max() < 2e-4


def test_what_is_held_are_the_stored_bytes(folder):
    """Every matrix in the bytes of its blocks, a tied one once; vectors in float32."""
    spec, _ = values(folder)
    model = load(folder)
    tensors = [*model.parameters(), *model.buffers()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    stored = sum(w.rows * blocks.row_bytes(w.format, w.cols) for w in spec.weights)
    rope = sum(b.untyped_storage().nbytes() for n, b in model.named_buffers() if "inv_freq" in n or "embed_scale" in n)
    assert sum(held.values()) == stored + rope
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if spec.tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    else:
        assert isinstance(model.get_output_embeddings(), PackedLinear)


def test_saving_gives_a_folder_that_both_read(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    before, after = values(folder), values(tmp_path / "saved")
    assert [(w.name, w.format) for w in before[0].weights] == [(w.name, w.format) for w in after[0].weights]
    for name, each in before[1].items():
        assert np.array_equal(each, after[1][name]), name
    again = load(tmp_path / "saved")
    assert np.array_equal(tiny.expected(again, IDS), tiny.expected(model, IDS))


def packed(shape):
    return weights.Packed("int4_g32_sym", shape, {})


def test_a_matrix_of_another_shape_is_refused(tmp_path):
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"proj": torch.nn.Linear(32, 8)})
    with pytest.raises(CorruptFile, match=r"shape \(8, 64\) in the files, \(8, 32\) in the model"):
        weights.replace(model, "proj.weight", packed((8, 64)), torch.float32)
    with pytest.raises(CorruptFile, match="no module"):
        weights.replace(model, "other.weight", packed((8, 32)), torch.float32)
