"""What tests of several parts share: a tiny model with random weights, as a GGUF file."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

# Triton looks at this when it is imported, which any import of a library may do.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """A Llama of 2 layers with tied Q8_0 embeddings and Q4_0 matrices, and a vocabulary of single bytes and "he"."""

    path: Path
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 2
    n_kv_heads: int = 1
    head_dim: int = 32
    d_ff: int = 128
    vocab_size: int = 259
    context_length: int = 512

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Shape of every matrix by its name in the file."""
        d, q, kv = self.d_model, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        layer = {
            "attn_q": (q, d),
            "attn_k": (kv, d),
            "attn_v": (kv, d),
            "attn_output": (d, q),
            "ffn_gate": (self.d_ff, d),
            "ffn_up": (self.d_ff, d),
            "ffn_down": (d, self.d_ff),
        }
        shapes = {f"blk.{i}.{name}.weight": shape for i in range(self.n_layers) for name, shape in layer.items()}
        return {"token_embd.weight": (self.vocab_size, d), **shapes}

    @property
    def n_matrix_weights(self) -> int:
        return sum(rows * cols for rows, cols in self.matrices.values())


def _byte_alphabet() -> list[str]:
    """The printable character of each byte, in the order in which byte-level tokenizers number them."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in plain] + [chr(0x100 + i) for i in range(256 - len(plain))]


def write_tiny_gguf(path: Path) -> TinyModel:
    """Write the model with a fixed seed."""
    import gguf

    model = TinyModel(path)
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*_byte_alphabet(), "<|im_start|>", "<|im_end|>", "he"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, (rows, cols) in model.matrices.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name.startswith("token") else gguf.GGMLQuantizationType.Q4_0
        values = rng.standard_normal((rows, cols), np.float32) * cols**-0.5
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm", *(f"blk.{i}.{n}" for i in range(model.n_layers) for n in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", np.ones(model.d_model, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> TinyModel:
    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")
