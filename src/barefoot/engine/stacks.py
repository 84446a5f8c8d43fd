"""Stacks: residual blocks of which as many are in memory as there is room for, and that come and go while a model runs.

A matrix of several signed blocks (:mod:`barefoot.ops.signs`) always has its first one. The others of all matrices stand
in one order, the model's *stack*; in memory are the first ones, one after the other in one range of addresses, so that
growing reads what is new, and shrinking gives back the end of the range to the system, and no byte is moved.

The order is the ``stack`` of a folder's record, a list of tensors; without it, level by level. The blocks of one matrix
keep theirs: each makes up for what the ones before it left.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.core.ledger import Footprint, Term, entry
from barefoot.core.lifetimes import ALIGNMENT
from barefoot.core.model import ModelSpec, PartSpec, WeightSpec
from barefoot.core.units import round_up
from barefoot.engine.arena import Arena
from barefoot.engine.config import EngineConfig
from barefoot.engine.files import WeightFiles
from barefoot.engine.placement import PAGE
from barefoot.io.files import atomic_writer
from barefoot.io.inventory import Checkpoint
from barefoot.io.strict_json import read_object
from barefoot.io.types import TensorInfo
from barefoot.ops import SignStack, signs

U8 = npt.NDArray[np.uint8]

OWNER = "stack"  # of the region in the arena
RECORD = "barefoot.json"  # beside the weights of a folder that this package wrote


# --- the order ------------------------------------------------------------------------------------------------------


def stacked(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """The spec with its stack, in the order that the folder's record states.

    Raises
    ------
    CorruptFile : the record names other parts than those of the stack, or a matrix's blocks out of their order.
    """
    blocks = level_by_level(spec.weights)
    record = checkpoint.path / RECORD
    names = read_object(record).get(OWNER) if blocks and record.is_file() else None
    return replace(spec, stack=blocks if names is None else in_order(blocks, names, record.name))


def level_by_level(weights: Sequence[WeightSpec]) -> tuple[PartSpec, ...]:
    """Every signed block but each matrix's first: the second ones of all matrices, then the third ones, …"""
    levels = itertools.zip_longest(*(signed(w)[1:] for w in weights))
    return tuple(part for level in levels for part in level if part is not None)


def signed(weight: WeightSpec) -> tuple[PartSpec, ...]:
    """The signed blocks of a weight, in their order."""
    return tuple(p for p in weight.parts if p.kind == signs.KIND.name)


def in_order(blocks: Sequence[PartSpec], names: object, where: str) -> tuple[PartSpec, ...]:
    """``blocks`` in the order of their tensors' ``names``, which stand ``where``; they come from a file."""
    known = {part.source: part for part in blocks}
    if not isinstance(names, list) or len(names) != len(known) or set(map(str, names)) != set(known):
        raise CorruptFile(f"{where}: {OWNER} must name each of the {len(known)} blocks that can be left out once")
    found = tuple(known[name] for name in names)
    last: dict[str, str] = {}
    for part in found:
        matrix = part.source.rpartition("+")[0]
        if last.get(matrix, "") > part.label:
            raise CorruptFile(f"{where}: {OWNER} has {part.source!r} behind a later block of its matrix")
        last[matrix] = part.label
    return found


def loaded(spec: ModelSpec, n: int) -> ModelSpec:
    """The model without the parts of its stack from the ``n``-th on: what a pass over the weights reads."""
    if n == len(spec.stack):
        return spec
    gone = set(spec.stack[n:])
    left = (replace(w, parts=tuple(p for p in w.parts if p not in gone)) for w in spec.weights)
    return replace(spec, weights=tuple(left), stack=spec.stack[:n])


def write_order(folder: Path, names: Sequence[str]) -> None:
    """Let the record of a folder state the order of its stack."""
    record = read_object(folder / RECORD) | {OWNER: list(names)}
    with atomic_writer(folder / RECORD) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


# --- bytes ----------------------------------------------------------------------------------------------------------


def n_stacked(spec: ModelSpec, config: EngineConfig) -> int:
    """How many parts of the stack are in memory.

    Raises
    ------
    InvalidInput : more than there are.
    """
    n = len(spec.stack) if config.n_stacked is None else config.n_stacked
    if not 0 <= n <= len(spec.stack):
        raise InvalidInput(f"n_stacked must be 0 to {len(spec.stack)} for {spec.name}, got {n}")
    return n


def stack_footprint(spec: ModelSpec, n: int) -> Footprint:
    """The entry of the first ``n`` parts of the stack: whole pages, as the system gives and takes them."""
    if not spec.stack:
        return Footprint()
    sizes = [part.n_bytes for part in spec.stack[:n]]
    terms = [Term("blocks", count, n_bytes) for n_bytes, count in Counter(sizes).items()]
    used = sum(round_up(n_bytes, ALIGNMENT) for n_bytes in sizes)
    terms.append(Term("alignment", used - sum(sizes), 1))
    terms.append(Term("rest of a page", round_up(used, PAGE) - used, 1))
    return entry(OWNER, "weights", terms, phases=("prefill", "decode"))


# --- while a model runs ---------------------------------------------------------------------------------------------


class Stacks:
    """The blocks of a model's stack that are in memory, none at first.

    Attributes
    ----------
    matrices : the stack of each matrix by name; given bound to the blocks that are always there.
    n : how many parts of the model's stack are in memory.
    n_read_bytes : read from files so far.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, TensorInfo],
        files: WeightFiles,
        arena: Arena,
        matrices: Mapping[str, SignStack],
    ) -> None:
        self._spec, self._parts = spec, spec.stack
        self._tensors, self._files, self._arena = tensors, files, arena
        self.matrices = dict(matrices)
        self._always = {name: tuple(stack.buffers) for name, stack in matrices.items()}
        by_source = {part.source: w.name for w in spec.weights for part in signed(w)}
        self._owners = [by_source[part.source] for part in spec.stack]
        sizes = (round_up(part.n_bytes, ALIGNMENT) for part in spec.stack)
        self._offsets = list(itertools.accumulate(sizes, initial=0))
        self.n = 0
        self.n_read_bytes = 0

    def resize(self, n: int) -> None:
        """Have the first ``n`` parts in memory: read those that are new, or give back those that are too many.

        Where a block can't be read, all is as before.

        Raises
        ------
        CorruptFile : a block can't be read.
        Incompatible : it is fewer, and this system does not take memory back.
        """
        before = self.n
        if n < before:
            self._bind(n)  # nothing may read what goes
        memory = self._map(n)
        try:
            for part, offset in zip(self._parts[before:n], self._offsets[before:], strict=False):
                tensor = self._tensors[part.source]
                self._files.read(tensor.shard, tensor.offset, memory[offset : offset + part.n_bytes])
                self.n_read_bytes += part.n_bytes
        except CorruptFile:
            self._map(before)
            raise
        self._memory = memory
        self._bind(n)

    def _map(self, n: int) -> U8:
        (planned,) = stack_footprint(self._spec, n)
        return self._arena.resize(planned, self._offsets[-1])

    def show(self, counts: Mapping[str, int]) -> None:
        """Let products see so many blocks of each of these matrices, of those in memory; ``show({})``: all again."""
        held = self._held(self.n)
        for name, stack in self.matrices.items():
            stack.bind([*self._always[name], *held.get(name, ())][: counts.get(name)])

    def _held(self, n: int) -> dict[str, list[U8]]:
        """Of the first ``n`` parts those of each matrix."""
        held: dict[str, list[U8]] = {}
        for i in range(n):
            start = self._offsets[i]
            held.setdefault(self._owners[i], []).append(self._memory[start : start + self._parts[i].n_bytes])
        return held

    def _bind(self, n: int) -> None:
        """Let the products see the first ``n`` parts."""
        held = self._held(n)
        for name in {*self._owners[min(n, self.n) : max(n, self.n)]}:
            self.matrices[name].bind([*self._always[name], *held.get(name, ())])
        self.n = n
