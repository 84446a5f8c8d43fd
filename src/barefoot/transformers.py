"""``import barefoot.transformers``: transformers loads barefoot's folders.

    import barefoot.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("fitted/")

Importing registers the quantization method that the folders' config.json names. Matrices that the files hold in blocks
become :mod:`barefoot.weights.module`'s modules, which keep the stored bytes and nothing else, a tied one once; the rest
is transformers' own. ``save_pretrained`` writes a folder that barefoot reads too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from barefoot.core.errors import CorruptFile, Incompatible
from barefoot.io.packed import VERSION, describe, interpret
from barefoot.io.safetensors import read_safetensors
from barefoot.io.types import FILE_TYPES
from barefoot.ops import blocks
from barefoot.weights.module import PackedEmbedding, PackedLinear

METHOD = "barefoot"


@register_quantization_config(METHOD)
class BarefootConfig(QuantizationConfigMixin):
    """What a folder's config.json says of its weights; their formats stand in the files beside them."""

    def __init__(self, version: int = VERSION, **more: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version


@register_quantizer(METHOD)
class BarefootQuantizer(HfQuantizer):
    """Puts packed modules where the files hold blocks, before transformers loads the files."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        **more: Any,
    ) -> Any:
        """Replace modules.

        Raises
        ------
        Incompatible : a matrix that is a sum of parts, or one that stands where there is no linear layer or embedding.
        CorruptFile : a description that contradicts the files, or a matrix of another shape than the model's.
        """
        packed = packed_matrices(checkpoint_files)
        for name, (format_id, shape) in packed.items():
            replace(model, name, format_id, shape, dtype or torch.float32)
        embedding = model.get_input_embeddings()
        if isinstance(embedding, PackedEmbedding) and model.config.tie_word_embeddings:
            model.set_output_embeddings(TiedLinear(embedding))
            # There is nothing left to tie, and transformers ties parameters only.
            model._tied_weights_keys, model.all_tied_weights_keys = {}, {}
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors to save, and their description: the metadata of one file that holds them all."""
        formats = {
            f"{name}.weight": (module.format, module.cols)
            for name, module in model.named_modules()
            if isinstance(module, PackedLinear | PackedEmbedding) and not isinstance(module, TiedLinear)
        }
        sizes = {f: (blocks.block_elements(f), blocks.block_bytes(f)) for f, _ in formats.values()}
        return dict(model.state_dict()), describe(formats, sizes)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed matrices learn; these don't change."""
        return True


class TiedLinear(PackedLinear):
    """A head that multiplies by the embedding's matrix, and holds none."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        nn.Module.__init__(self)
        self._embedding = (embedding,)  # in a tuple, so that it is no module of this one
        self.format, self.rows, self.cols = embedding.format, embedding.rows, embedding.cols
        self.in_features, self.out_features, self.bias = embedding.cols, embedding.rows, None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self._embedding[0].weight


def packed_matrices(files: Sequence[str]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """(format, shape) of the matrices that safetensors files hold in blocks, by name."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        file = read_safetensors(path)
        for tensor in interpret(file.path.name, file.metadata, file.tensors):
            if "+" in tensor.name:
                raise Incompatible(
                    f"{tensor.name} is a part of a sum, which runs in barefoot's engine only",
                    cure="run it with: barefoot run, or fit the model again without a structure",
                )
            if tensor.type in blocks.names() and tensor.type not in FILE_TYPES:
                found[tensor.name] = tensor.type, tensor.shape
    return found


def replace(model: nn.Module, name: str, format_id: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Put a packed module, without memory yet, in the place of the one whose ``weight`` is called ``name``."""
    path = name.removesuffix(".weight")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise CorruptFile(f"the files hold {name!r}, for which {type(model).__name__} has no module") from None
    made: PackedLinear | PackedEmbedding
    if isinstance(module, nn.Linear):
        expected = (module.out_features, module.in_features)
        made = PackedLinear(format_id, *reversed(expected), bias=module.bias is not None, device="meta")
    elif isinstance(module, nn.Embedding):
        expected = (module.num_embeddings, module.embedding_dim)
        # Gemma's embedding multiplies by a number of its own.
        scale = float(getattr(module, "scalar_embed_scale", 1.0))
        made = PackedEmbedding(format_id, *expected, scale=scale, dtype=dtype, device="meta")
    else:
        raise Incompatible(
            f"{name!r} belongs to a {type(module).__name__}; packed matrices replace Linear and Embedding"
        )
    if expected != shape:
        raise CorruptFile(f"{name!r} has shape {shape} in the files, {expected} in the model")
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, made)
