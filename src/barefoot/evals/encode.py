"""A text as windows of ids, encoded in a process of its own: what a tokenizer leaves behind, tens of MiB that no
allocator gives back, is then no part of the job that follows.

    python -m barefoot.evals.encode '{"model": PATH, "text": NAME, "wanted": [[WINDOW, N_WINDOWS], ...]}'

prints ``{"windows": [...]}``, or ``{"error": [class, message, cure]}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from barefoot.core import errors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SOURCES = str(Path(__file__).parents[2])


def spread(model: Path, text: str, wanted: Sequence[tuple[int, int]]) -> list[npt.NDArray[np.int32]]:
    """``scoring.spread_windows`` of a text that ``texts.read_text`` knows, for each of ``wanted``: (window, n_windows).

    Raises
    ------
    BarefootError : as these do, and as the model's tokenizer does.
    """
    import numpy as np

    told = json.dumps({"model": str(model), "text": text, "wanted": [list(each) for each in wanted]})
    path = os.pathsep.join(filter(None, (SOURCES, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", __name__, told],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        check=False,
    )
    try:
        said = json.loads(done.stdout)
    except ValueError:
        raise errors.InvalidInput(
            f"encoding {text} ended with exit code {done.returncode}", cure="look at what it printed above"
        ) from None
    if "error" in said:
        kind, message, cure = said["error"]
        raise getattr(errors, kind)(message, cure=cure)
    return [np.array(each, np.int32) for each in said["windows"]]


def _answer(model: str, text: str, wanted: list[list[int]]) -> dict[str, Any]:
    from barefoot.evals.scoring import spread_windows
    from barefoot.evals.texts import read_text
    from barefoot.io.inventory import Checkpoint
    from barefoot.io.tokenizer import load_tokenizer

    try:
        with Checkpoint(model) as checkpoint:
            tokenizer = load_tokenizer(checkpoint)
        content = read_text(text)
        return {"windows": [spread_windows(content, tokenizer, *each).tolist() for each in wanted]}
    except errors.BarefootError as error:
        return {"error": [error.name, str(error), error.cure]}


if __name__ == "__main__":
    print(json.dumps(_answer(**json.loads(sys.argv[1]))))
