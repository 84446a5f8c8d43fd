"""A training's state in one file, from which it goes on as if it had never stopped.

A safetensors file: what learns (``adapter.NAME``) with the optimizer's moments (``first.NAME``, ``second.NAME``,
float32), what has learned and no longer does (``settled.NAME``), the random state, and in its metadata, as JSON, the
step, the place in the data, and what tells one training from another. It takes its name only when all of it is on disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from barefoot.core import untrusted
from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.io.files import BinaryFile
from barefoot.io.safetensors import array_entry, read_safetensors, write_safetensors
from barefoot.io.strict_json import parse_object

KEY = "barefoot.training"
NAME = "training.safetensors"
MOST_STEPS = 1 << 40


@dataclass
class Progress:
    """
    Attributes
    ----------
    step, skipped : steps that are done, and those of them that were not finite and changed nothing.
    data : where the next one's data begin.
    best, best_step : the lowest held-out loss so far, and after how many steps.
    """

    step: int = 0
    skipped: int = 0
    data: Mapping[str, int] | None = None
    best: float | None = None
    best_step: int = 0


def save(
    path: Path,
    identity: str,
    progress: Progress,
    learned: Mapping[str, Tensor],
    settled: Mapping[str, Tensor],
    optimizer: Any,
) -> None:
    """Write all of it; an earlier file stays until this one is whole. Of moments, a piece at a time is in memory."""
    entries: list[Any] = [array_entry("random", torch.get_rng_state().numpy())]
    entries += [array_entry(f"settled.{name}", values.numpy()) for name, values in settled.items()]
    for name, parameter in learned.items():
        entries.append(array_entry(f"adapter.{name}", parameter.detach().numpy()))
        for moment, pieces in optimizer.moments(parameter).items():
            entries.append((f"{moment}.{name}", "f32", tuple(parameter.shape), pieces))
    facts = {"identity": identity, **vars(progress)}
    write_safetensors(path, entries, {KEY: json.dumps(facts)})


class StateFile:
    """A state that was written. ``progress`` says how far it is; ``restore`` takes up the rest.

    Raises
    ------
    InvalidInput : it is of another training: other data, another model or other settings.
    CorruptFile : it is none, or it is damaged.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path, file = path, read_safetensors(path)
        text = file.metadata.get(KEY)
        if text is None:
            raise CorruptFile(f"{path.name} holds no training")
        header = parse_object(text.encode(), f"{path.name}: {KEY}")
        if header.get("identity") != identity:
            raise InvalidInput(
                f"{path.parent} holds a training with other data, another model or other settings",
                cure="go on with the same, or name another folder",
            )
        self.progress = _progress(header)
        self._found = {tensor.name: tensor for tensor in file.tensors}

    def restore(self, learned: Mapping[str, Tensor], settled: Mapping[str, Tensor], optimizer: Any) -> None:
        """Fill these, which are as they were behind ``progress.step``, the moments and the random state.

        Raises
        ------
        CorruptFile : a tensor is missing, or of another shape.
        """
        step = self.progress.step - self.progress.skipped
        with BinaryFile(self._path) as data, torch.no_grad():
            random = torch.from_numpy(self._read(data, "random", "u8", tuple(torch.get_rng_state().shape)))
            for kind, tensors in (("adapter", learned), ("settled", settled)):
                for name, tensor in tensors.items():
                    tensor.copy_(torch.from_numpy(self._read(data, f"{kind}.{name}", "f32", tuple(tensor.shape))))
            for name, parameter in learned.items():
                if step:
                    shape = tuple(parameter.shape)
                    found = {key: self._read(data, f"{key}.{name}", "f32", shape) for key in ("first", "second")}
                    optimizer.restore(parameter, step, found)
        torch.set_rng_state(random)

    def _read(self, data: BinaryFile, name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = self._found.get(name)
        if tensor is None or tensor.type != kind or tuple(tensor.shape) != shape:
            raise CorruptFile(f"{self._path.name} has no {kind} tensor {name!r} of shape {shape}")
        out = np.empty(shape, np.uint8 if kind == "u8" else np.float32)
        data.read_into(tensor.offset, out.reshape(-1).view(np.uint8).data)
        return out


def _progress(header: Mapping[str, Any]) -> Progress:
    step = untrusted.count(header, "step", MOST_STEPS)
    data, best = header.get("data"), header.get("best")
    if not isinstance(data, dict) or not all(type(v) is int and v >= 0 for v in data.values()):
        raise CorruptFile("the place in the data is no record of counts")
    if best is not None and not isinstance(best, float):
        raise CorruptFile(f"the best loss is {best!r}, no number")
    skipped, best_step = (untrusted.count(header, name, step) for name in ("skipped", "best_step"))
    return Progress(step, skipped, data, best, best_step)
