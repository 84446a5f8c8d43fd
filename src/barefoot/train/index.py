"""The table of a training's documents as a file, so that one that goes on needs no pass over its data again.

A safetensors file: ``entries``, u8, are the table's bytes (:data:`ENTRY`), and the metadata, under
``barefoot.documents``, is JSON: ``key``, which tells what the table is of (the files' bytes, how documents are made of
them, and the tokenizer's model), and the numbers of its ``statistics``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot.core import untrusted
from barefoot.core.errors import CorruptFile
from barefoot.io.files import BinaryFile
from barefoot.io.safetensors import array_entry, read_safetensors, write_safetensors
from barefoot.io.strict_json import parse_object
from barefoot.train.encoding import BYTES_PER_TOKEN

KEY = "barefoot.documents"
MOST = 1 << 62
MAX_LINE_BYTES = 8 << 20

ENTRY = np.dtype(
    [
        ("start", "<i8"),  # first byte of the line, or of the window of a plain text
        ("size", "<i4"),  # bytes of it
        ("begin", "<i4"),  # first character of the window of a line's text
        ("tokens", "<i4"),
        ("file", "<u2"),
        ("ends", "?"),  # whether a text ends with this window
    ]
)
Entries = npt.NDArray[np.void]


@dataclass
class Statistics:
    """What the files hold: ``n_learned`` tokens are to be predicted, ``n_cut`` documents lost their end, ``n_dropped``
    records had nothing to predict within their first tokens. ``longest`` document, in tokens; ``longest_bytes`` of a
    line or window."""

    n_records: int = 0
    n_documents: int = 0
    n_tokens: int = 0
    n_learned: int = 0
    n_cut: int = 0
    n_dropped: int = 0
    longest: int = 0
    longest_bytes: int = 0


def write_index(path: Path, key: str, entries: Entries, statistics: Statistics) -> None:
    """Write a table; the file appears whole or not at all."""
    facts = {"key": key, "statistics": vars(statistics)}
    write_safetensors(path, [array_entry("entries", entries.view(np.uint8))], {KEY: json.dumps(facts)})


def read_index(path: Path, key: str, sizes: list[int], length: int) -> tuple[Entries, Statistics] | None:
    """What was written with the same key; None where there is none, or one with another.

    Parameters
    ----------
    sizes : bytes of each of the files.
    length : tokens of a document, at most.

    Raises
    ------
    CorruptFile : no table, or places that are not in the files.
    """
    if not path.is_file():
        return None
    file = read_safetensors(path)
    facts = parse_object(file.metadata.get(KEY, "").encode(), f"{path.name}: {KEY}")
    if facts.get("key") != key:
        return None
    if [(tensor.name, tensor.type) for tensor in file.tensors] != [("entries", "u8")]:
        raise CorruptFile(f"{path.name} holds no table of documents")
    (tensor,) = file.tensors
    if not tensor.n_bytes or tensor.n_bytes % ENTRY.itemsize:
        raise CorruptFile(f"{path.name}: {tensor.n_bytes} bytes are no table of {ENTRY.itemsize} bytes a document")
    entries = np.empty(tensor.n_bytes // ENTRY.itemsize, ENTRY)
    with BinaryFile(path) as data:
        data.read_into(tensor.offset, entries.view(np.uint8).data)
    _check(path, entries, sizes, length)
    numbers = facts.get("statistics")
    if not isinstance(numbers, dict):
        raise CorruptFile(f"{path.name} has no statistics")
    return entries, Statistics(**{each.name: untrusted.count(numbers, each.name, MOST) for each in fields(Statistics)})


def _check(path: Path, entries: Entries, sizes: list[int], length: int) -> None:
    low = {"start": 0, "size": 1, "begin": 0, "tokens": 1}
    reach = max(MAX_LINE_BYTES, BYTES_PER_TOKEN * length)
    most = {"size": reach, "begin": reach, "tokens": length, "file": len(sizes) - 1}
    wrong = any((entries[name] < least).any() for name, least in low.items())
    wrong = wrong or any((entries[name] > value).any() for name, value in most.items())
    if wrong or (entries["start"] > np.array(sizes)[entries["file"]] - entries["size"]).any():
        raise CorruptFile(f"{path.name} has documents that are not in the data", cure=f"remove {path}")
