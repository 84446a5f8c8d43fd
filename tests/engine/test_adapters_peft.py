"""PEFT and the engine on each other's adapters: the same logits of the same folder, whoever wrote it."""

import numpy as np
import pytest
import tiny
from adapter_folders import random_pairs, spec_of, write_random_adapter
from test_architectures import TOLERANCE

torch = pytest.importorskip("torch", reason="PEFT needs torch")
peft = pytest.importorskip("peft", reason="the files are PEFT's: pip install 'barefoot[reference]'")

from barefoot.adapters.files import read_adapter  # noqa: E402
from barefoot.engine.adapter_files import load_adapter, save_adapter  # noqa: E402
from barefoot.engine.beside import beside  # noqa: E402

# Of transformers 5.23, about a name that PEFT asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = np.random.default_rng(8).integers(0, 97, 30).tolist()
MODELS = ("llama-gqa-9-3", "mistral", "qwen2", "qwen3", "gemma3", "phi3")
LEAVES = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def engine_logits(model, adapter) -> np.ndarray:
    with tiny.engine(model, chunk=16, adapter=beside(spec_of(model), read_adapter(adapter))) as run:
        return tiny.all_logits(run, IDS, 25)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("what", ["all", "some layers", "ranks and scales of their own"])
def test_peft_loads_what_is_written(tmp_path, name, what):
    model = tiny.build(name)
    model.save_pretrained(tmp_path / "model")
    spec = spec_of(tmp_path / "model")
    pairs = random_pairs(spec, rank=(lambda n: 2 + len(n) % 4) if "own" in what else 4)
    if what == "some layers":
        pairs = {n: p for n, p in pairs.items() if n.startswith("layers.1.")}
    save_adapter(tmp_path / "adapter", spec, pairs, base=str(tmp_path / "model"))
    plain = tiny.expected(model, IDS)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    expected = tiny.expected(loaded, IDS)
    assert np.abs(expected - plain).max() > 0.1
    assert np.abs(engine_logits(tmp_path / "model", tmp_path / "adapter") - expected).max() < TOLERANCE


SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 3, "lora_alpha": 2, "use_rslora": True, "init_lora_weights": "gaussian"},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"o_proj": 2, "layers.0.mlp.down_proj": 7},
        "alpha_pattern": {"down_proj": 3, r"^model\.layers\.1\.self_attn\.o_proj": 1},
    },
    "some layers": {"r": 4, "lora_alpha": 8, "layers_to_transform": [0, 2]},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_peft_writes_is_read(tmp_path, name, settings):
    model = tiny.build(name)
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=LEAVES.get(name, USUAL), lora_dropout=0.1, **SETTINGS[settings]
    )
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = tiny.expected(wrapped, IDS)
    assert np.abs(engine_logits(tmp_path / "model", tmp_path / "adapter") - expected).max() < TOLERANCE
    spec = spec_of(tmp_path / "model")
    pairs = load_adapter(spec, read_adapter(tmp_path / "adapter"))
    save_adapter(tmp_path / "again", spec, pairs)
    before, after = (
        {module.name: (module.rank, pytest.approx(module.scale)) for module in read_adapter(tmp_path / folder).modules}
        for folder in ("adapter", "again")
    )
    assert before == after  # Phi-3's share their A as before


def test_two_byte_types(tmp_path):
    model = tiny.build("llama-gqa-9-3")
    model.save_pretrained(tmp_path / "model")
    for type_id in ("f16", "bf16"):
        write_random_adapter(tmp_path / "model", tmp_path / type_id, type_id=type_id)
        loaded = peft.PeftModel.from_pretrained(tiny.build("llama-gqa-9-3"), str(tmp_path / type_id)).eval()
        expected = tiny.expected(loaded, IDS)
        assert np.abs(engine_logits(tmp_path / "model", tmp_path / type_id) - expected).max() < TOLERANCE
