"""barefoot's folders in transformers.

Matrices that the files hold in blocks become :mod:`barefoot.weights.module`'s modules, which keep the stored bytes and
nothing else, a tied one once; the rest is transformers' own. ``save_pretrained`` writes a folder that barefoot reads
too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from barefoot.core.errors import CorruptFile, Incompatible, UnsupportedFormat
from barefoot.io.packed import VERSION, describe, interpret
from barefoot.io.safetensors import read_safetensors
from barefoot.io.types import TensorInfo
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
        Incompatible : a matrix that stands where there is no linear layer or embedding.
        CorruptFile : a description that contradicts the files, or a matrix of another shape than the model's.
        """
        for name, found in packed_matrices(checkpoint_files).items():
            replace(model, name, found, dtype or torch.float32)
        embedding = model.get_input_embeddings()
        if isinstance(embedding, PackedEmbedding) and model.config.tie_word_embeddings:
            model.set_output_embeddings(TiedLinear(embedding))
            # There is nothing left to tie, and transformers ties parameters only.
            model._tied_weights_keys, model.all_tied_weights_keys = {}, {}
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors to save, and their description: the metadata of one file that holds them all."""
        packed = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, PackedLinear | PackedEmbedding) and not isinstance(module, TiedLinear)
        }
        formats = {f"{name}.weight": (module.format, module.cols) for name, module in packed.items()}
        sizes = {f: (blocks.block_elements(f), blocks.block_bytes(f)) for f, _ in formats.values()}
        parts = {
            f"{name}.{part}": (kind, module.rows, module.cols)
            for name, module in packed.items()
            for part, kind in module.kinds.items()
        }
        return dict(model.state_dict()), describe(formats, sizes, parts)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed matrices learn; these don't change."""
        return True


class TiedLinear(PackedLinear):
    """A head that multiplies by the embedding's matrix, whose rows it leaves as they lie, and holds none."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        nn.Module.__init__(self)
        self._embedding = (embedding,)  # in a tuple, so that it is no module of this one
        self.format, self.rows, self.cols = embedding.format, embedding.rows, embedding.cols
        self.in_features, self.out_features, self.bias = embedding.cols, embedding.rows, None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self._embedding[0].weight

    def arrange(self) -> bool:
        """The embedding reads single rows, so they stay rows."""
        return False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the embedding saves it."""


@dataclass(frozen=True)
class Packed:
    """What the files hold of a matrix: its blocks, and kind and bytes of each part by its label."""

    format: str
    shape: tuple[int, ...]
    added: Mapping[str, tuple[str, int]]


def packed_matrices(files: Sequence[str]) -> dict[str, Packed]:
    """The matrices that safetensors files hold in blocks, by name."""
    matrices: dict[str, TensorInfo] = {}
    added: dict[str, dict[str, tuple[str, int]]] = {}
    for path in files:
        file = read_safetensors(path)
        for stored, tensor in zip(file.tensors, interpret(file.path.name, file.metadata, file.tensors), strict=True):
            whole, _, label = tensor.name.partition("+")
            if label:
                added.setdefault(whole, {})[label] = tensor.type, tensor.n_bytes
            elif tensor.type != stored.type:
                matrices[tensor.name] = tensor
    orphans = sorted(set(added) - set(matrices))
    if orphans:
        raise CorruptFile(f"the files hold parts of {', '.join(orphans[:3])}, and no blocks")
    return {name: Packed(t.type, t.shape, added.get(name, {})) for name, t in matrices.items()}


def replace(model: nn.Module, name: str, packed: Packed, dtype: torch.dtype) -> None:
    """Put a packed module, without memory yet, in the place of the one whose ``weight`` is called ``name``."""
    if packed.format not in blocks.names():
        raise UnsupportedFormat(f"tensor {name!r} is stored as {packed.format}; known: {', '.join(blocks.names())}")
    path = name.removesuffix(".weight")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise CorruptFile(f"the files hold {name!r}, for which {type(model).__name__} has no module") from None
    made: PackedLinear | PackedEmbedding
    if isinstance(module, nn.Linear):
        expected = (module.out_features, module.in_features)
        bias = module.bias is not None
        made = PackedLinear(packed.format, *reversed(expected), bias=bias, added=packed.added, device="meta")
    elif isinstance(module, nn.Embedding):
        expected = (module.num_embeddings, module.embedding_dim)
        # Gemma's embedding multiplies by a number of its own.
        scale = float(getattr(module, "scalar_embed_scale", 1.0))
        made = PackedEmbedding(packed.format, *expected, scale=scale, dtype=dtype, device="meta")
    else:
        raise Incompatible(
            f"{name!r} belongs to a {type(module).__name__}; packed matrices replace Linear and Embedding"
        )
    if expected != packed.shape:
        raise CorruptFile(f"{name!r} has shape {packed.shape} in the files, {expected} in the model")
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, made)
