"""What all decoders share: reading sizes from a header and listing the weights.

An architecture's file names its roles (``q``, ``gate``, ``attn_norm`` …) and where its files keep them; shapes follow
from the roles, and are checked against the tensors when those are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from barefoot.core.errors import CorruptFile, UnsupportedFormat
from barefoot.core.model import LayerSpec, ModelSpec, PartSpec, WeightGroup, WeightSpec
from barefoot.io.quantized import PackedLinear, methods
from barefoot.ops import blocks, parts

_GROUPS: dict[str, WeightGroup] = {
    "embed": "embed",
    "head": "head",
    **dict.fromkeys(("q", "k", "v", "o"), "attn"),
    **dict.fromkeys(("gate", "up", "down"), "ffn"),
}  # every other role is a vector, of the group "norm"

OWN_METHOD = "barefoot"  # quant_method of the folders that this package writes

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class Tensor(Protocol):
    """What is read of a file's tensor: its stored type and its shape, the last axis contiguous."""

    @property
    def type(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def n_bytes(self) -> int: ...


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A tensor's name, with ``{i}`` for the layer, and the role's first row in it as a sum of sizes of roles."""

    template: str
    after: tuple[str, ...] = ()


Roles = Mapping[str, Source]


def roles(templates: Mapping[str, str]) -> dict[str, Source]:
    return {role: Source(template) for role, template in templates.items()}


HF_ATTN_BIAS = roles({f"{r}_bias": f"model.layers.{{i}}.self_attn.{r}_proj.bias" for r in "qkv"})
HF_QK_NORM = roles({f"{r}_norm": f"model.layers.{{i}}.self_attn.{r}_norm.weight" for r in "qk"})
HF = roles(
    {
        "embed": "model.embed_tokens.weight",
        "attn_norm": "model.layers.{i}.input_layernorm.weight",
        **{r: f"model.layers.{{i}}.self_attn.{r}_proj.weight" for r in "qkvo"},
        "ffn_norm": "model.layers.{i}.post_attention_layernorm.weight",
        **{r: f"model.layers.{{i}}.mlp.{r}_proj.weight" for r in ("gate", "up", "down")},
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
    }
)

GGUF_ATTN_BIAS = roles({f"{r}_bias": f"blk.{{i}}.attn_{r}.bias" for r in "qkv"})
GGUF_QK_NORM = roles({f"{r}_norm": f"blk.{{i}}.attn_{r}_norm.weight" for r in "qk"})
GGUF = roles(
    {
        "embed": "token_embd.weight",
        "attn_norm": "blk.{i}.attn_norm.weight",
        **{r: f"blk.{{i}}.attn_{r}.weight" for r in "qkv"},
        "o": "blk.{i}.attn_output.weight",
        "ffn_norm": "blk.{i}.ffn_norm.weight",
        **{r: f"blk.{{i}}.ffn_{r}.weight" for r in ("gate", "up", "down")},
        "norm": "output_norm.weight",
        "head": "output.weight",
    }
)


def fused_after(template: str, names: Iterable[str]) -> dict[str, Source]:
    """Roles that lie one after the other in the rows of one tensor."""
    names = tuple(names)
    return {role: Source(template, names[:n]) for n, role in enumerate(names)}


@dataclass(frozen=True)
class Sizes:
    """The numbers that a header gives and that all shapes follow from."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    norm_eps: float

    def shape(self, role: str) -> tuple[int, int]:
        """(rows, cols) of a role; vectors are (1, n)."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes = {
            "embed": (self.vocab_size, self.d_model),
            "head": (self.vocab_size, self.d_model),
            "q": (q, self.d_model),
            "k": (kv, self.d_model),
            "v": (kv, self.d_model),
            "o": (self.d_model, q),
            "gate": (self.d_ff, self.d_model),
            "up": (self.d_ff, self.d_model),
            "down": (self.d_model, self.d_ff),
            "q_bias": (1, q),
            "k_bias": (1, kv),
            "v_bias": (1, kv),
            "q_norm": (1, self.head_dim),
            "k_norm": (1, self.head_dim),
        }
        return shapes.get(role, (1, self.d_model))


def need(values: Mapping[str, Any], key: str) -> int:
    """A positive whole number of a header."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CorruptFile(f"{key} must be a positive whole number, got {value!r}")
    return value


def _matrix(tensors: Tensors, name: str) -> tuple[str, tuple[int, int]]:
    """The stored type and (rows, cols) of a tensor."""
    if name not in tensors:
        raise CorruptFile(f"the file lacks the tensor {name!r}")
    tensor = tensors[name]
    if tensor.type not in blocks.names():
        raise UnsupportedFormat(f"tensor {name!r} is stored as {tensor.type}; known: {', '.join(blocks.names())}")
    if len(tensor.shape) not in (1, 2) or not all(tensor.shape):
        raise CorruptFile(f"tensor {name!r} has shape {tensor.shape}; a matrix or a vector is expected")
    return tensor.type, (1 if len(tensor.shape) == 1 else tensor.shape[0], tensor.shape[-1])


def _parts(tensors: Tensors) -> dict[str, tuple[PartSpec, ...]]:
    """What is to be added to each tensor: parts are named ``TENSOR+LABEL``.

    Raises
    ------
    UnsupportedFormat : a kind that is not known.
    CorruptFile : a part of another shape than its matrix, or of none.
    """
    found: dict[str, tuple[PartSpec, ...]] = {}
    for name in sorted(n for n in tensors if "+" in n):
        whole, _, label = name.partition("+")
        part = tensors[name]
        if part.type not in parts.names():
            raise UnsupportedFormat(f"tensor {name!r} is stored as {part.type}; known: {', '.join(parts.names())}")
        if whole not in tensors or tensors[whole].shape != part.shape:
            raise CorruptFile(f"{name!r} is a part {part.shape} of no matrix of that shape")
        found[whole] = (*found.get(whole, ()), PartSpec(label, part.type, part.n_bytes, name))
    return found


def _first_layer(tensors: Tensors, names: Roles, role: str) -> tuple[int, int]:
    return _matrix(tensors, names[role].template.format(i=0))[1]


def _sizes(stated: Mapping[str, int | None], eps: float, tensors: Tensors | None, names: Roles) -> Sizes:
    """Sizes that can be read off tensors come from them; a header that states another number is refused."""
    values = dict(stated)
    if tensors is not None:
        vocab_size, d_model = _first_layer(tensors, names, "embed")
        n_q = _first_layer(tensors, names, "o")[1]
        if n_q % (values["n_heads"] or 1):
            raise CorruptFile(f"{n_q} attention outputs can't be shared by {values['n_heads']} heads")
        found = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "head_dim": n_q // (values["n_heads"] or 1),
            "d_ff": _first_layer(tensors, names, "down")[1],
        }
        for key, value in found.items():
            if values[key] not in (None, value):
                raise CorruptFile(f"the header states {key} {values[key]}, the tensors have {value}")
        values |= found
    elif values["head_dim"] is None:
        values["head_dim"] = (values["d_model"] or 0) // (values["n_heads"] or 1)
    missing = [key for key, value in values.items() if not value]
    if missing:
        raise CorruptFile(f"the header states no {', '.join(missing)}")
    if values["n_heads"] % values["n_kv_heads"]:  # type: ignore[operator]
        raise CorruptFile(f"{values['n_heads']} heads can't share {values['n_kv_heads']} key-value heads")
    return Sizes(norm_eps=eps, **values)  # type: ignore[arg-type]


def hf_sizes(config: Mapping[str, Any], tensors: Tensors | None, names: Roles = HF) -> Sizes:
    """Sizes of a config.json, checked against the tensors."""
    method = (config.get("quantization_config") or {}).get("quant_method", "unknown")
    readable = (OWN_METHOD, *methods()) if tensors is not None else (OWN_METHOD,)  # the config alone states no bytes
    if config.get("quantization_config") and method not in readable:
        raise UnsupportedFormat(
            f"safetensors quantized by {method} are not supported; known: {', '.join(sorted(methods()))}",
            cure="use the unquantized model, or a GGUF file",
        )
    n_heads = need(config, "num_attention_heads")
    stated = {
        "d_model": need(config, "hidden_size"),
        "n_layers": need(config, "num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": config.get("num_key_value_heads") or n_heads,
        "head_dim": config.get("head_dim"),
        "d_ff": need(config, "intermediate_size"),
        "vocab_size": need(config, "vocab_size"),
        "context_length": need(config, "max_position_embeddings"),
    }
    return _sizes(stated, float(config.get("rms_norm_eps", 1e-6)), tensors, names)


def gguf_sizes(metadata: Mapping[str, Any], tensors: Tensors | None, names: Roles = GGUF) -> Sizes:
    """Sizes of a GGUF header, checked against the tensors."""
    arch = metadata["general.architecture"]
    n_heads = need(metadata, f"{arch}.attention.head_count")
    stated = {
        "d_model": need(metadata, f"{arch}.embedding_length"),
        "n_layers": need(metadata, f"{arch}.block_count"),
        "n_heads": n_heads,
        "n_kv_heads": metadata.get(f"{arch}.attention.head_count_kv", n_heads),
        "head_dim": metadata.get(f"{arch}.attention.key_length"),
        "d_ff": need(metadata, f"{arch}.feed_forward_length"),
        "vocab_size": metadata.get(f"{arch}.vocab_size"),
        "context_length": need(metadata, f"{arch}.context_length"),
    }
    return _sizes(stated, float(metadata.get(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)), tensors, names)


def hf_format(config: Mapping[str, Any]) -> str:
    """The stored type that a config.json names; bf16 when it names none."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise UnsupportedFormat(f"weights of dtype {dtype!r} are not supported; known: {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def hf_activation(config: Mapping[str, Any]) -> Literal["silu", "gelu_tanh"]:
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if name not in _ACTIVATIONS:
        raise UnsupportedFormat(f"activation {name!r} is not supported; known: {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def hf_config(spec: ModelSpec, model_type: str, class_name: str, **more: Any) -> dict[str, Any]:
    """The config.json that every ``from_hf`` reads this spec from; ``more`` adds to it, or replaces."""
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items() if theirs != "gelu_new"}
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.d_ff,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": activations[spec.activation],
        "tie_word_embeddings": spec.tied,
        "torch_dtype": "float32",
    }
    return config | more


def gguf_metadata(spec: ModelSpec, arch: str, rope_keys: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The keys of a GGUF file from which ``from_gguf`` reads this spec; ``more`` are of attention, None for none."""
    keys = {
        "block_count": spec.n_layers,
        "context_length": spec.context_length,
        "embedding_length": spec.d_model,
        "feed_forward_length": spec.d_ff,
        "vocab_size": spec.vocab_size,
        **{f"rope.{key}": value for key, value in rope_keys.items()},
    }
    attention = {
        "head_count": spec.n_heads,
        "head_count_kv": spec.n_kv_heads,
        "key_length": spec.head_dim,
        "value_length": spec.head_dim,
        "layer_norm_rms_epsilon": spec.norm_eps,
        **{key: value for key, value in more.items() if value is not None},
    }
    keys |= {f"attention.{key}": value for key, value in attention.items()}
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in keys.items()}


def hf_roles(names: Roles, *, tied: bool, tensors: Tensors | None = None) -> dict[str, Source]:
    """The names as this checkpoint spells them: without a head when it is tied, below another prefix than ``model.``.

    Checkpoints of models with several modalities keep the language model below a prefix of their own.
    """
    kept = {role: source for role, source in names.items() if not (tied and role == "head")}
    tail = "embed_tokens.weight"
    prefix = next((n.removesuffix(tail) for n in tensors or () if n.endswith(tail)), "model.")
    return {
        r: replace(s, template=prefix + s.template[6:] if s.template.startswith("model.") else s.template)
        for r, s in kept.items()
    }


def gguf_roles(names: Roles, tensors: Tensors | None) -> dict[str, Source]:
    """The names without those that the file lacks and may lack: the head, when it is tied, and biases."""
    optional = {"head", *GGUF_ATTN_BIAS}
    if tensors is None:
        return dict(names)
    return {r: s for r, s in names.items() if r not in optional or s.template.format(i=0) in tensors}


def weights(names: Roles, sizes: Sizes, tensors: Tensors | None, default_format: str) -> tuple[WeightSpec, ...]:
    """Every weight, in the order in which a pass uses them.

    Raises
    ------
    CorruptFile : a tensor is missing, or has another shape than the header says.
    """
    fused: dict[str, int] = {}
    for role, source in names.items():
        fused[source.template] = fused.get(source.template, 0) + sizes.shape(role)[0]
    addends = _parts(tensors) if tensors is not None else {}

    def spec(role: str, layer: int | None) -> WeightSpec:
        source, (rows, cols) = names[role], sizes.shape(role)
        tensor_name = source.template.format(i=layer)
        stored, packed_bytes = default_format, 0
        if tensors is not None:
            found = tensors.get(tensor_name)
            packed_bytes = found.n_bytes if isinstance(found, PackedLinear) else 0
            stored, shape = _matrix(tensors, tensor_name)
            if shape != (fused[source.template], cols):
                raise CorruptFile(
                    f"tensor {tensor_name!r} is {shape}, the header implies {(fused[source.template], cols)}"
                )
            if tensor_name in addends and (layer is None or shape[0] != rows):
                raise UnsupportedFormat(f"{tensor_name!r} has parts, and is not one matrix of a layer")
        return WeightSpec(
            name=role if layer is None else f"layers.{layer}.{role}",
            group=_GROUPS.get(role, "norm"),
            rows=rows,
            cols=cols,
            format=stored,
            source=tensor_name,
            row_start=sum(sizes.shape(before)[0] for before in source.after),
            parts=addends.get(tensor_name, ()),
            packed_bytes=packed_bytes,
        )

    outer = ("embed", "norm", "head")
    inner = [role for role in names if role not in outer]
    result = [spec("embed", None)]
    result += [spec(role, layer) for layer in range(sizes.n_layers) for role in inner]
    result += [spec(role, None) for role in outer[1:] if role in names]
    return tuple(result)


def model(
    arch: str, sizes: Sizes, layers: Iterable[LayerSpec], weight_specs: tuple[WeightSpec, ...], **fields: Any
) -> ModelSpec:
    """The spec of these sizes; attention is scaled by 1/sqrt(head_dim) unless ``fields`` say otherwise."""
    fields.setdefault("attn_scale", sizes.head_dim**-0.5)
    return ModelSpec(
        name=fields.pop("name", arch),
        arch=arch,
        d_model=sizes.d_model,
        n_heads=sizes.n_heads,
        n_kv_heads=sizes.n_kv_heads,
        head_dim=sizes.head_dim,
        d_ff=sizes.d_ff,
        vocab_size=sizes.vocab_size,
        context_length=sizes.context_length,
        layers=tuple(layers),
        weights=weight_specs,
        norm_eps=sizes.norm_eps,
        **fields,
    )
