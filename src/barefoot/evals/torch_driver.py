"""A model in PyTorch, to be scored like one in the engine: transformers' own modules, packed where the files are."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from barefoot import ops
from barefoot.core.errors import BackendMissing, Incompatible
from barefoot.core.model import ModelSpec
from barefoot.engine.config import EngineConfig
from barefoot.engine.sequences import Sequences

Floats = NDArray[np.float32]
LEAST_TRANSFORMERS = (4, 56)  # caches that know a model's layers, and dtype as the argument's name


class TorchModel:
    """One sequence of a causal model that transformers loads, in float32. ``config.context`` tokens at most.

    ``folder`` is one of transformers' or barefoot's. Its code is never run, and weights are read from safetensors only.

    Raises
    ------
    BackendMissing : PyTorch or transformers is not installed, or what the folder's own format needs.
    Incompatible : no folder; the weights of a GGUF file are the engine's.
    """

    def __init__(self, folder: Path, spec: ModelSpec, config: EngineConfig) -> None:
        _require_transformers()
        if not (folder / "config.json").is_file():
            cure = f"write one: barefoot export {folder} --to barefoot -o DIR"
            raise Incompatible(f"{folder.name} is no folder that transformers reads", cure=cure)
        import torch
        import transformers

        import barefoot.transformers  # noqa: F401 - registers the folders

        library: Any = transformers  # much of it has no types
        library.utils.logging.disable_progress_bar()
        ops.set_threads(config.n_threads)  # of what decodes packed rows
        torch.set_num_threads(config.n_threads)
        self.spec, self.config, self._torch = spec, config, torch
        try:
            self._model = library.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
            ).eval()
        except ImportError as error:  # a quantization method with a library of its own
            raise BackendMissing(f"transformers can't read {folder.name}: {error}") from error
        self.reset()

    def __enter__(self) -> TorchModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._model, self._past

    @property
    def weight_bytes(self) -> int:
        """Of the storages of all parameters and buffers, shared ones once."""
        storages = (t.untyped_storage() for t in (*self._model.parameters(), *self._model.buffers()))
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def reset(self) -> None:
        from transformers import DynamicCache

        self._past, self._sequences = DynamicCache(config=self._model.config), Sequences(self.spec, self.config)

    def prefill(self, ids: Sequence[int], *, all_logits: Callable[[int, Floats], None] | None = None) -> Floats:
        """As ``Engine.prefill``."""
        self._sequences.check(ids, 0)
        with self._torch.inference_mode():
            found = self._model(
                input_ids=self._torch.tensor([list(ids)]),
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=1 if all_logits is None else 0,
            )
        self._sequences.grow({0: len(ids)})
        logits: Floats = found.logits[0].float().numpy()
        if all_logits is not None:
            all_logits(0, logits)
        last: Floats = logits[-1]
        return last


def _require_transformers() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        cure = f"pip install {' '.join(missing)}"
        raise BackendMissing(f"scoring in PyTorch needs {' and '.join(missing)}", cure=cure)
    version = importlib.metadata.version("transformers")
    if tuple(map(int, version.split(".")[:2])) < LEAST_TRANSFORMERS:
        least = ".".join(map(str, LEAST_TRANSFORMERS))
        raise BackendMissing(
            f"scoring in PyTorch needs transformers {least}, here is {version}", cure="pip install -U transformers"
        )
