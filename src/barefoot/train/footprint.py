"""What tuning takes, before anything is allocated: a frozen base in blocks, adapters, and what a pass keeps.

N tokens pass at a time. Of a layer with d hidden channels, Q channels of queries in H heads, K of keys, f of its
feed-forward, and m adapters of rank r, a pass keeps for its backward, in numbers of the products' type,

    N × (2 d [normed inputs of products] + 2 Q + 2 K [queries, keys, values, outputs] + f + m r)

once more Q where that type is not float32 (an adapter that needs no inputs keeps none of 2 d, f and this), and in
float32 N × (d [between the halves] + 2 f [gate and up] + H + 2 [log-sum-exp, norms' factors]), with norms over heads
Q + K and a number for each head more, with norms behind the halves d + 1 each. With ``activations="keep"`` all layers
have it at once; with ``"recompute"`` one has, while it is passed again, and of each there is its input, N × d. An
adapter that stands aside states what its passes keep itself.

A pruned copy has fewer heads and channels in some layers; scores of what is to be cut take one pass beforehand, with a
layer of the whole model at a time. A teacher passes forward before each step in the same way
(:mod:`barefoot.train.lesson`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from barefoot.adapters import Adapter, Aside, Beside, Passing
from barefoot.adapters.lora import LoRA
from barefoot.adapters.pruning import Pruning, Sizes, pruned_spec
from barefoot.core.ledger import Footprint, Phase, Term, entry
from barefoot.core.model import ModelSpec, WeightGroup, WeightSpec
from barefoot.optim import Optimizer
from barefoot.optim.adamw import Adam
from barefoot.train.lesson import Lesson
from barefoot.train.losses import Loss, LossShape
from barefoot.weights.formats import WeightFormat
from barefoot.weights.formats.stored import Stored

Activations = Literal["keep", "recompute"]
Compute = Literal["float32", "bfloat16"]
ACTIVATIONS: tuple[Activations, ...] = ("keep", "recompute")
COMPUTE_BYTES: Mapping[Compute, int] = {"float32": 4, "bfloat16": 2}
TILE_BYTES = 4 << 20  # of decoded weights, float32
PIECE_BYTES = 4 << 20  # of a weight while it is loaded

LOADING = Term("rows that are read, decoded and encoded", 3, PIECE_BYTES)
ADAM = Adam()
_TRAINING: tuple[Phase, ...] = ("forward", "backward", "step", "save")
_ALL: tuple[Phase, ...] = ("load", *_TRAINING)


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned.

    Attributes
    ----------
    n_tokens : of a micro-batch, at most.
    length : of a document, at most.
    formats : of the base's matrices by group; others stay as they are stored.
    accumulates : whether a step has several micro-batches, so that there are gradients before the last one's.
    step, steps : how far it is, of how many; what learns may become less.
    pruning : what is cut out of the base, if anything.
    lesson : of the teacher that the loss imitates.
    """

    adapter: Adapter
    loss: Loss
    n_tokens: int
    length: int
    formats: Mapping[WeightGroup, WeightFormat]
    activations: Activations = "recompute"
    compute: Compute = "float32"
    accumulates: bool = False
    optimizer: Optimizer = ADAM
    step: int = 0
    steps: int = 1
    pruning: Pruning | None = None
    lesson: Lesson | None = None

    def layout(self, weight: WeightSpec) -> str:
        """Blocks that the columns of a matrix of the base have to fill."""
        return format_of(weight, self.formats).filled(weight.format)

    def sizes(self, spec: ModelSpec) -> Sizes:
        """Heads of keys and channels of the layers that lose some."""
        return {} if self.pruning is None else self.pruning.sizes(spec, self.layout)


def format_of(weight: WeightSpec, formats: Mapping[WeightGroup, WeightFormat]) -> WeightFormat:
    """In which the base has a matrix, of those that are stated by group.

    Raises
    ------
    Incompatible : it has no rows, and rows are read from the matrix: from the embedding, and from the head.
    """
    found = formats.get(weight.group, Stored())
    if weight.layer is None:
        found.layout(weight.format)
    return found


def footprint(spec: ModelSpec, tuning: Tuning) -> Footprint:
    """All of it, besides the process itself. ``spec`` is the whole model's."""
    passes = _passes_aside if isinstance(tuning.adapter, Aside) else _passes
    copy = pruned_spec(spec, tuning.sizes(spec))
    found = _base(copy, tuning) + _adapter(copy, tuning) + passes(copy, tuning)
    if tuning.lesson is not None:
        found += entry("teacher", "activations", [tuning.lesson.states()], phases=_TRAINING)
    return found if tuning.pruning is None else found + _cutting(spec, tuning, tuning.pruning)


def _cutting(spec: ModelSpec, tuning: Tuning, pruning: Pruning) -> Footprint:
    """What it takes to choose what is cut, to know it, and to write the adapter for the whole model."""
    units = Term("heads and channels that are left", sum(map(sum, tuning.sizes(spec).values())), 4)
    factors = Term(
        "adapters put back, and as they are written", sum(f.n_elements for f in tuning.adapter.factors(spec)), 8
    )
    found = entry("pruning", "index", [units], phases=_ALL) + entry("pruning", "workspace", [factors], phases=("save",))
    layers = pruning.layers(spec)
    return found + _scoring(spec, tuning, layers) if pruning.scored and layers else found


def _scoring(spec: ModelSpec, tuning: Tuning, layers: range) -> Footprint:
    """A pass of a micro-batch through the whole model, of which one layer at a time is in memory."""
    n, once = tuning.n_tokens, replace(tuning, adapter=LoRA(rank=1), activations="recompute")  # whose inputs are kept
    by_layer = [_matrices((w for w in spec.weights if w.layer == i), tuning) for i in range(spec.n_layers)]
    largest = max((w for w in spec.weights if w.layer in layers), key=lambda w: w.rows + w.cols)
    copies = Term("of products, inputs and gradients in float32", n * (largest.rows + largest.cols), 4)
    passing = [
        [_tile(spec), _tile(spec), *([] if tuning.compute == "float32" else [copies]), *workspace.entries[0].terms]
        for phase in ("forward", "backward")
        if (workspace := _passes(spec, once).select(phase=phase, kind="workspace"))
    ]
    held = [
        Term("inputs of the layers", n * spec.d_model * (spec.n_layers - layers.start), 4),
        Term("turns of positions", n * sum(r.dim for r in {layer.rope for layer in spec.layers}), 4),
        Term("scores", sum(w.rows + w.cols for w in spec.weights if w.layer in layers and w.group != "norm"), 4),
    ]
    weights = [*_matrices((w for w in spec.weights if w.layer is None), tuning), *_larger(*by_layer)]
    return (
        entry("scoring", "weights", weights, phases=("convert",))
        + entry("scoring", "activations", held, phases=("convert",))
        + entry("scoring", "workspace", _larger([LOADING], *passing), phases=("convert",))
    )


@functools.cache
def _bytes_of(format: WeightFormat, rows: int, cols: int, stored: str) -> int:
    return sum(term.bytes for term in format.terms("", rows, cols, stored))


def _matrices(weights: Iterable[WeightSpec], tuning: Tuning) -> list[Term]:
    terms = []
    for weight in weights:
        if weight.group == "norm":
            terms.append(Term(weight.name, weight.n_elements, 4))
        else:
            found = format_of(weight, tuning.formats)
            terms.append(Term(weight.name, 1, _bytes_of(found, weight.rows, weight.cols, weight.format)))
            terms += [Term(f"{weight.name} {part.label}", 1, part.n_bytes) for part in weight.parts]
    return terms


def _base(spec: ModelSpec, tuning: Tuning) -> Footprint:
    decoded = [spec] if tuning.lesson is None else [spec, tuning.lesson.spec]
    return (
        entry("base", "weights", _matrices(spec.weights, tuning), phases=_ALL)
        + entry("base", "workspace", [LOADING], phases=("load",))
        + entry("base", "workspace", [_tile(*decoded)], phases=_TRAINING)  # stays, once it is there
    )


def _adapter(spec: ModelSpec, tuning: Tuning) -> Footprint:
    name, factors = tuning.adapter.name, tuning.adapter.factors(spec, tuning.step, tuning.steps)
    n_held, sizes = sum(f.n_elements for f in factors), [f.n_elements for f in factors if f.trained]
    gradients, optimizer = Term("gradients", sum(sizes), 4), tuning.optimizer
    found = (
        entry(name, "adapter", [Term("adapters", n_held, 4)], phases=_ALL)
        + entry(name, "workspace", tuning.adapter.load_terms(spec), phases=("load",))
        + entry(name, "optimizer", optimizer.state_terms(sizes), phases=_TRAINING)
        + entry(name, "gradients", [gradients], phases=("step",))
        + entry(name, "workspace", optimizer.step_terms(sizes), phases=("step",))
    )
    if tuning.accumulates:
        return found + entry(name, "gradients", [gradients], phases=("forward", "backward"))
    come, freed, beside = 0, 0, 0  # as gradients come, layer by layer, what the layers behind kept goes
    for gradient, kept in reversed(list(zip(_gradients(spec, tuning), _kept_by_layers(spec, tuning), strict=True))):
        come += gradient
        beside, freed = max(beside, come - freed), freed + kept
    return found + entry(name, "gradients", [Term("gradients beside what is kept", 1, beside)], phases=("backward",))


@dataclass(frozen=True)
class _Sizes:
    """Of a layer, numbers a token."""

    hidden: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    forward: int

    @classmethod
    def of(cls, spec: ModelSpec) -> _Sizes:
        queries, keys = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        return cls(spec.d_model, spec.n_heads, spec.n_kv_heads, queries, keys, spec.d_ff)


def _alike(spec: ModelSpec) -> list[tuple[list[int], ModelSpec]]:
    """The layers by their sizes: numbers of those of one, and a model of them alone."""
    cols = {weight.name: weight.cols for weight in spec.weights}
    layers: dict[tuple[int, int], list[int]] = {}
    for index in range(spec.n_layers):
        layers.setdefault((cols[f"layers.{index}.o"], cols[f"layers.{index}.down"]), []).append(index)
    if layers.keys() == {(spec.n_heads * spec.head_dim, spec.d_ff)}:
        return [(list(range(spec.n_layers)), spec)]
    found = []
    for (queries, channels), indexes in layers.items():
        n_heads = queries // spec.head_dim
        alike = replace(
            spec,
            n_heads=n_heads,
            n_kv_heads=n_heads * spec.n_kv_heads // spec.n_heads,
            d_ff=channels,
            layers=tuple(spec.layers[i] for i in indexes),
            weights=tuple(w for w in spec.weights if w.layer in (None, *indexes)),
        )
        found.append((indexes, alike))
    return found


def _kept(spec: ModelSpec, tuning: Tuning) -> tuple[list[Term], list[Term]]:
    """What all layers keep, each beside its input, and what one does at most."""
    width, s, adapter = COMPUTE_BYTES[tuning.compute], _Sizes.of(spec), tuning.adapter
    assert isinstance(adapter, Beside)
    n, copied = tuning.n_tokens, s.queries if adapter.keeps_inputs and tuning.compute != "float32" else 0
    roles = {w.name.rpartition(".")[2] for w in spec.weights if w.layer is not None}
    one = [
        Term("queries, keys, values and outputs of heads", n * (2 * s.queries + 2 * s.keys + copied), width),
        Term("gates, and what lies between the halves", n * (s.hidden + 2 * s.forward + s.heads + 2), 4),
    ]
    if "q_norm" in roles:
        one.append(Term("queries and keys before their norms", n * (s.queries + s.keys + s.heads + s.key_heads), 4))
    if behind := len(roles & {"post_attn_norm", "post_ffn_norm"}):
        one.append(Term("what is normed behind the halves", n * behind * (s.hidden + 1), 4))
    if adapter.keeps_inputs:
        one.append(Term("inputs of products", n * (2 * s.hidden + s.forward), width))
    every = [Term(term.name, term.count * spec.n_layers, term.bytes_each) for term in one]
    thin = {name: adapter.kept(rank, tuning.step, tuning.steps) for name, rank in adapter.ranks_of(spec).items()}
    most: dict[str, int] = {}  # by role
    for name, numbers in thin.items():
        role = name.rpartition(".")[2]
        most[role] = max(numbers, most.get(role, 0))
    in_all, in_one = (Term("thin products", n * sum(each.values()), width) for each in (thin, most))
    return [*every, in_all], [*one, in_one]


def _passes(spec: ModelSpec, tuning: Tuning) -> Footprint:
    n, loss, copies = tuning.n_tokens, tuning.loss, [alike for _, alike in _alike(spec)]
    s = max(map(_Sizes.of, copies), key=lambda sizes: sizes.queries + sizes.forward)
    shape, width = _loss_shape(spec, tuning), COMPUTE_BYTES[tuning.compute]
    held = Term("what a pass holds besides", n * (2 * s.hidden + s.queries + 2 * s.keys), 4)
    gates = Term("gradients of the gates", n * 2 * s.forward, 4)
    hidden = Term("gradients of hidden states", n * 2 * s.hidden, 4)
    ends = Term("behind the last layer, and behind its norm", n * 2 * s.hidden, 4)
    kept = [_kept(alike, tuning) for alike in copies]
    every, one = [term for terms, _ in kept for term in terms], _larger(*(terms for _, terms in kept))
    keeps = tuning.activations == "keep"
    always = [
        Term("inputs of the layers", n * s.hidden * spec.n_layers, 4),
        Term("turns of positions", n * sum(r.dim for r in {layer.rope for layer in spec.layers}), 4),
        *(every if keeps else ()),
    ]
    passed = [ends] if keeps else [*one, held]
    back = [*([] if keeps else one), gates, hidden]
    if width != 4:  # products take them so
        back += [Term("a tile in the products' type", _tile(spec).bytes // 4, width)]
        back += [Term("a gradient in the products' type", n * s.forward, width)]
    forward = _larger(passed, [ends, *_compared(tuning, shape)], _taught_before(tuning, always))
    backward = _larger([*passed, hidden], back, [ends, *loss.saved_terms(shape), *loss.backward_terms(shape)])
    return (
        entry("passes", "activations", always, phases=("forward", "backward"))
        + entry("the layer or the loss", "workspace", forward, phases=("forward",))
        + entry("the layer or the loss", "workspace", backward, phases=("backward",))
    )


def _gradients(spec: ModelSpec, tuning: Tuning) -> list[int]:
    """Bytes of them by layer; of an adapter that stands aside the mean."""
    factors = [f for f in tuning.adapter.factors(spec, tuning.step, tuning.steps) if f.trained]
    if isinstance(tuning.adapter, Aside):
        return [4 * sum(f.n_elements for f in factors) // spec.n_layers] * spec.n_layers
    found = [0] * spec.n_layers
    for factor in factors:
        found[int(factor.name.split(".")[1])] += 4 * factor.n_elements
    return found


def _kept_by_layers(spec: ModelSpec, tuning: Tuning) -> list[int]:
    """Bytes that go, layer by layer, while gradients come."""
    if isinstance(tuning.adapter, Aside):
        kept = sum(term.bytes for term in _passing(spec, tuning, tuning.adapter).kept)
        return [kept // spec.n_layers] * spec.n_layers
    found = [4 * tuning.n_tokens * spec.d_model] * spec.n_layers
    if tuning.activations == "keep":
        for layers, alike in _alike(spec):
            kept = sum(term.bytes for term in _kept(alike, tuning)[0]) // len(layers)
            for index in layers:
                found[index] += kept
    return found


def _passing(spec: ModelSpec, tuning: Tuning, adapter: Aside) -> Passing:
    return adapter.passing(spec, tuning.n_tokens, tuning.length, COMPUTE_BYTES[tuning.compute])


def _passes_aside(spec: ModelSpec, tuning: Tuning) -> Footprint:
    assert isinstance(tuning.adapter, Aside)
    passing, loss, shape = _passing(spec, tuning, tuning.adapter), tuning.loss, _loss_shape(spec, tuning)
    head = (*passing.head, Term("behind the head", tuning.n_tokens * spec.d_model, 4))
    forward = _larger(passing.forward, [*head, *_compared(tuning, shape)], _taught_before(tuning, passing.kept))
    moments = passing.backward, (*loss.saved_terms(shape), *loss.backward_terms(shape))
    backward = [*head, *_larger(*moments)]
    return (
        entry("passes", "activations", passing.kept, phases=("forward", "backward"))
        + entry("the layer or the loss", "workspace", forward, phases=("forward",))
        + entry("the layer or the loss", "workspace", backward, phases=("backward",))
    )


def _tile(*specs: ModelSpec) -> Term:
    sizes = (4 * w.n_elements for spec in specs for w in spec.weights if w.layer is not None and w.group != "norm")
    return Term("a tile of decoded weights", 1, min(TILE_BYTES, max(sizes)))


def _loss_shape(spec: ModelSpec, tuning: Tuning) -> LossShape:
    n = tuning.n_tokens
    width = tuning.lesson.spec.d_model if tuning.lesson else 0
    cap, most = bool(spec.logit_softcap), max(1, n - 1)  # a document's last token predicts nothing
    return LossShape(n, most, spec.d_model, spec.vocab_size, head_bytes=0, softcap=cap, taught_width=width)


def _compared(tuning: Tuning, shape: LossShape) -> list[Term]:
    """Of the loss, and what is read of a teacher's head for a tile of the logits."""
    terms = [*tuning.loss.forward_terms(shape)]
    if tuning.lesson is not None:
        terms.append(tuning.lesson.head_rows(getattr(tuning.loss, "tile_vocab", shape.vocab_size)))
    return terms


def _taught_before(tuning: Tuning, kept: Sequence[Term]) -> list[Term]:
    """A teacher's pass as far as it takes more than what passes keep that are behind it."""
    terms = () if tuning.lesson is None else tuning.lesson.passing(tuning.n_tokens)
    beyond = sum(term.bytes for term in terms) - sum(term.bytes for term in kept)
    return [Term("a teacher's pass, beyond what passes keep", 1, max(0, beyond))]


def _larger(*moments: Sequence[Term]) -> Sequence[Term]:
    """What is there in the moment in which most is: a layer's bytes and the loss's are never there together."""
    return max(moments, key=lambda terms: sum(term.bytes for term in terms))
