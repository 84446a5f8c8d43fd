"""An adapter beside the matrices of a model that runs: parts of thin factors, added to whatever the matrices are.

They are resident and keep the numbers of the file (:mod:`barefoot.ops.lowrank`), so a packed matrix is never unpacked,
a layer that passes through from disk has its factors at hand, and a matrix that is a sum already has one addend more.
"""

from __future__ import annotations

from barefoot.adapters.files import AdapterFile, read_adapter
from barefoot.core.errors import CorruptFile
from barefoot.core.model import ModelSpec, PartSpec
from barefoot.engine.adapter_files import matched, split
from barefoot.engine.arena import Arena
from barefoot.engine.config import AdapterParts
from barefoot.ops import Part, lowrank

OWNER = "adapter"  # of the region in the arena, and the label of the parts


def beside(spec: ModelSpec, file: AdapterFile) -> AdapterParts:
    """What the adapter adds to the model's matrices, from headers alone.

    Raises
    ------
    Incompatible : it is of another model.
    """
    parts = []
    for fused, module in matched(spec, file):
        for weight in fused.weights:
            size = lowrank.n_bytes(module.type, weight.rows, weight.cols, module.rank)
            parts.append((weight.name, PartSpec(OWNER, lowrank.kind(module.type), size, module.name)))
    return AdapterParts(str(file.path), tuple(parts))


def load(spec: ModelSpec, adapter: AdapterParts, arena: Arena) -> dict[str, Part]:
    """The parts in memory, by the matrices' names.

    Raises
    ------
    CorruptFile : the folder is not as it was when ``adapter`` was made of it, or its numbers are not finite.
    """
    file = read_adapter(adapter.path)
    if beside(spec, file) != adapter:
        raise CorruptFile(f"{adapter.path} has changed since the run was planned", cure="run it again")
    planned, found = dict(adapter.parts), {}
    for fused, module in matched(spec, file):
        pairs = split(spec, fused, file.pair(module))
        for weight in fused.weights:
            part, pair = planned[weight.name], pairs.pop(weight.name)
            data = arena.take(OWNER, part.n_bytes)
            lowrank.encode_into(data, module.type, pair.a, pair.b, pair.scale)
            found[weight.name] = Part(part.kind, weight.rows, weight.cols, data)
    return found
