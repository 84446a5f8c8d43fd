"""What tests of training share; the tiny model's tokens are all bytes, and "he"."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from barefoot.io.chat import ChatTemplate, find_chat_template
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import Tokenizer, load_tokenizer
from barefoot.train.encoding import Encoder


@pytest.fixture(scope="session")
def tokenizer(tiny_gguf) -> Tokenizer:
    with Checkpoint(tiny_gguf.path) as checkpoint:
        return load_tokenizer(checkpoint)


@pytest.fixture(scope="session")
def template(tiny_gguf) -> ChatTemplate:
    with Checkpoint(tiny_gguf.path) as checkpoint:
        found = find_chat_template(checkpoint)
    assert found is not None
    return found


@pytest.fixture
def encoder(tokenizer: Tokenizer, template: ChatTemplate) -> Encoder:
    return Encoder(tokenizer, template, 256)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """``jsonl(record, …)`` writes a file of these records, a line each; bytes are written as they are."""

    def write(*records: Any, name: str = "data.jsonl") -> Path:
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


@pytest.fixture
def one_torch_thread():
    """Networks as small as the tests' only wait for a second one."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def no_scratch(monkeypatch):
    """Tiles of weights are decoded into scratch of their own size, not that of an earlier, larger model."""
    from barefoot.weights import module

    monkeypatch.setattr(module, "_shared", module._Scratch())
