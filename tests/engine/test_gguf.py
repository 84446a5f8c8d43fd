"""The same tiny model as a GGUF file and as a safetensors folder gives the same logits."""

import gguf
import numpy as np
import pytest
import tiny

# transformers' names: GGUF's, per layer and outside
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ARCHS = {"mistral": "llama", "gemma3_text": "gemma3"}


def write_gguf(path, model) -> None:
    """Write a transformers model in float32 as llama.cpp's converter lays it out."""
    config = model.config
    arch = ARCHS.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        factor = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(factor) / np.log(original))))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, head_dim))
    if arch == "gemma3":
        writer.add_attention_scale(config.query_pre_attn_scalar**-0.5)
    if arch == "gemma3" and config.layer_types[:2] == ["sliding_attention", "full_attention"]:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])

    inner = INNER | (GEMMA if arch == "gemma3" else {})
    for name, parameter in model.state_dict().items():
        values = parameter.float().numpy().copy()
        stem, tail = name.rsplit(".", 1)
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        if arch == "gemma3" and "norm" in stem:
            values += 1
        if stem in OUTER:
            writer.add_tensor(f"{OUTER[stem]}.{tail}", values)
            continue
        _, _, layer, role = stem.split(".", 3)
        if arch == "llama" and role in ("self_attn.q_proj", "self_attn.k_proj"):
            n_heads = config.num_attention_heads if "q_proj" in role else config.num_key_value_heads
            # rows i and i + head_dim / 2 of a head become neighbours
            values = values.reshape(n_heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"blk.{layer}.{inner[role]}.{tail}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_divisors(rope: dict, dim: int) -> np.ndarray:
    """What each frequency is divided by, written as the rule reads: by wavelength."""
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    divisors = []
    for wavelength in wavelengths:
        turns = rope["original_max_position_embeddings"] / wavelength
        if turns < rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        elif turns > rope["high_freq_factor"]:
            divisors.append(1.0)
        else:
            share = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            divisors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.array(divisors, np.float32)


# GGUF has no key for a window in some Qwen2 layers only.
@pytest.mark.parametrize("name", [name for name in tiny.MODELS if name != "qwen2-window"])
def test_gguf_equals_transformers(name, tmp_path):
    model = tiny.build(name)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model)
    ids = np.random.default_rng(6).integers(0, model.config.vocab_size, 40).tolist()
    with tiny.engine(path, chunk=16) as run:
        assert run.spec.tied == model.config.tie_word_embeddings
        assert np.abs(tiny.all_logits(run, ids, 30) - tiny.expected(model, ids)).max() < 2e-4
