"""The file of metrics, as it is after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from barefoot.core.errors import BackendMissing, CorruptFile
from barefoot.train.metrics import Metrics, read, require_tensorboard, tensorboard


def write(path: Path, first: int, n: int) -> None:
    with Metrics(path, first - 1) as metrics:
        for step in range(first, n):
            metrics.write(step, loss=1 / (step + 1), tokens=step * 10)
            if step % 3 == 0:
                metrics.write(step, held_out_loss=2 / (step + 1))
                metrics.sync()


def test_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert list(read(path)) == []
    with Metrics(path) as metrics:
        metrics.write(0, loss=0.5, note="größer", tokens=3)
        metrics.write(1, loss=float("nan"), rate=float("inf"))
    assert list(read(path)) == [
        {"step": 0, "loss": 0.5, "note": "größer", "tokens": 3},
        {"step": 1, "loss": None, "rate": None},
    ]


@pytest.mark.parametrize("resumed", range(0, 10, 3))
def test_an_interrupted_curve_is_the_whole_one(tmp_path: Path, resumed: int):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write(whole, 0, 12)
    complete = whole.read_bytes()
    behind = [end for end, line in _ends(complete) if line["step"] == resumed][-1]
    for killed_at in range(behind, len(complete) + 1, 7):
        cut.write_bytes(complete[:killed_at])
        write(cut, resumed + 1, 12)
        assert cut.read_bytes() == complete


def _ends(raw: bytes) -> list[tuple[int, dict[str, int]]]:
    found, end = [], 0
    for line in raw.splitlines(keepends=True):
        end += len(line)
        found.append((end, json.loads(line)))
    return found


def test_a_new_run_takes_old_lines_away(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 5)
    with Metrics(path):
        pass
    assert path.read_bytes() == b""


def test_an_unfinished_line_is_not_read(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": 1}\n{"step": 1, "lo')
    assert list(read(path)) == [{"step": 0, "loss": 1}]


@pytest.mark.parametrize("content", [b"# my notes\n", b'{"loss": 1}\n', b'{"step": true}\n', b"x" * 70_000])
def test_another_file_is_left_alone(tmp_path: Path, content: bytes):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match="notes, line 1"):
        Metrics(path)
    assert path.read_bytes() == content


def test_lines_outlive_a_killed_process(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path; from barefoot.train.metrics import Metrics\n"
        "metrics = Metrics(Path(sys.argv[1]))\n"
        "for step in range(100): metrics.write(step, loss=1.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["step"] for line in read(path)] == list(range(100))


def test_every_number_goes_to_the_writer_too(tmp_path: Path):
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[object] = []

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.calls.append((tag, scalar_value, global_step))

        def flush(self) -> None:
            self.calls.append("flush")

        def close(self) -> None:
            self.calls.append("close")

    recorder = Recorder()
    with Metrics(tmp_path / "m", writer=recorder) as metrics:
        metrics.write(4, loss=0.5, note="x", tokens=3)
        metrics.sync()
    assert recorder.calls == [("loss", 0.5, 4), ("tokens", 3, 4), "flush", "close"]


def test_tensorboard_is_asked_to_hide_what_a_killed_run_wrote(tmp_path: Path, monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            made.append((folder, purge_step))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "torch.utils", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    require_tensorboard()
    tensorboard(tmp_path, 7)
    assert made == [(str(tmp_path), 8)], "steps from 8 on come anew"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BackendMissing, match="TensorBoard is not installed"):
        require_tensorboard()
