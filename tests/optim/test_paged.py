"""Paged moments: the weights of PyTorch's AdamW bit for bit, out of less memory than its moments take."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from barefoot.core.errors import InvalidInput
from barefoot.optim.adamw import Adam
from barefoot.optim.paged import PagedAdam

torch = pytest.importorskip("torch", reason="the optimizers are PyTorch's")

from allocations import Allocations  # noqa: E402

from barefoot.optim.driver.paged import PagedAdamW  # noqa: E402
from barefoot.optim.driver.pager import Pager  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPES = [(7, 33), (1000,), (64, 50), (1,), (5000,), (3, 700)]  # 11,532 numbers, 92,256 bytes of moments
PAGE, RESIDENT = 2048, 4 * 2048  # 46 pages, of which less than a tenth stays
N_PAGES = 46
RULE = {"betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.03}


def parameters() -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def paged(tmp_path: Path, mine: list[torch.nn.Parameter], **rule) -> PagedAdamW:
    return PagedAdamW(mine, tmp_path, PAGE, RESIDENT, **rule)


def draw_gradients(step: int, *all_of_them: list[torch.nn.Parameter]) -> None:
    """The same for each; now and then one has none."""
    draw = torch.Generator().manual_seed(100 + step)
    for i, together in enumerate(zip(*all_of_them, strict=True)):
        gradient = torch.randn(SHAPES[i], generator=draw) * 10.0 ** (step % 5 - 3)
        for parameter in together:
            parameter.grad = None if (step + i) % 7 == 0 else gradient.clone()


def test_two_hundred_steps_are_adams_bit_for_bit(tmp_path):
    mine, theirs = parameters(), parameters()
    ours, reference = paged(tmp_path, mine, **RULE), torch.optim.AdamW(theirs, foreach=False, fused=False, **RULE)
    held = ours.pager.frames
    for step in range(200):
        draw_gradients(step, mine, theirs)
        for optimizer in (ours, reference):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
        assert ours.pager.frames is held
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), step
    assert held.nbytes == RESIDENT + PAGE  # all pages that are in memory, and nothing beside them is kept
    assert {key for state in ours.state.values() for key in state} == {"step"}
    for a, b in zip(mine, theirs, strict=True):
        for moment, key in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            pieces = [piece.copy() for piece in ours.moments(a)[moment]]
            assert np.array_equal(np.concatenate(pieces), reference.state[b][key].numpy().reshape(-1))


def test_a_step_moves_what_is_not_in_memory_and_no_more(tmp_path, monkeypatch):
    """Every other step goes backwards: one that always went forwards would move all pages."""
    moved = {"_read": 0, "_write": 0}
    for name in moved:
        real = getattr(Pager, name)

        def counted(self, number, page, name=name, real=real):
            moved[name] += 1
            real(self, number, page)

        monkeypatch.setattr(Pager, name, counted)
    mine = parameters()
    ours = paged(tmp_path, mine)
    for step in range(3):
        for parameter in mine:
            parameter.grad = torch.ones_like(parameter)
        ours.step()
        gone = N_PAGES - RESIDENT // PAGE - 1
        assert moved == {"_read": step * gone, "_write": (step + 1) * gone}  # at first there is nothing to read


def test_a_pager_is_an_array(tmp_path):
    """Pages at random, changed or only read, with another one on its way or none."""
    draw, known = np.random.default_rng(0), np.zeros((12, 64), np.uint8)
    pager = Pager(tmp_path, 12, 64, 3)
    for _ in range(3000):
        number, ahead = (int(n) for n in draw.integers(0, 12, 2))
        changes = bool(draw.integers(2))
        with pager.page(number, changes=changes, ahead=ahead if ahead % 3 else None) as page:
            assert np.array_equal(page, known[number])
            if changes:
                page[:] = known[number] = draw.integers(0, 256, 64)
    assert not list(tmp_path.iterdir())  # the file has no name
    pager.close()


def test_a_disk_without_room_is_told_of_at_once(tmp_path, monkeypatch):
    def full(fd, offset, n_bytes):
        assert n_bytes == N_PAGES * PAGE
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(InvalidInput, match="no room for 94,208 bytes"):
        paged(tmp_path, parameters())


def test_what_is_remembered_is_taken_up_again(tmp_path):
    """By either optimizer from either, in the middle."""
    kinds = [Adam(), PagedAdam(resident=1, page=4)]
    found = []
    for first in kinds:
        for second in kinds:
            mine = parameters()
            optimizer = first.over(mine, tmp_path, **RULE)
            for step in range(1, 9):
                if step == 5:
                    after = second.over(mine, tmp_path, **RULE)
                    for parameter, shape in zip(mine, SHAPES, strict=True):
                        moments = {
                            name: np.concatenate([piece.reshape(-1).copy() for piece in pieces]).reshape(shape)
                            for name, pieces in optimizer.moments(parameter).items()
                        }
                        after.restore(parameter, 4, moments)
                    optimizer = after
                for i, parameter in enumerate(mine):
                    parameter.grad = torch.full_like(parameter, float(step * (i + 1)))
                optimizer.param_groups[0]["lr"] = 1e-2
                optimizer.step()
            found.append(torch.cat([p.detach().reshape(-1) for p in mine]))
    assert all(torch.equal(found[0], each) for each in found)


def test_rows_that_stay_keep_their_moments(tmp_path):
    mine, theirs = ([torch.nn.Parameter(torch.ones(40, 30)), torch.nn.Parameter(torch.ones(99))] for _ in range(2))
    ours, reference = paged(tmp_path, mine, **RULE), Adam().over(theirs, tmp_path, **RULE)
    rows = {2: slice(7, None), 4: slice(0, 20), 6: slice(20, 20)}
    for step in range(9):
        for params, optimizer in ((mine, ours), (theirs, reference)):
            if step in rows:
                params[0].data = params[0].data[rows[step]].clone()
                optimizer.keep(params[0], rows[step])
            if step == 7:
                optimizer.forget(params[0])
            draw = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=draw)
            params[0].grad = None if step >= 7 else params[0].grad
            optimizer.param_groups[0]["lr"] = 1e-2
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), step


@pytest.mark.parametrize("knobs", [{"resident": 1, "page": 4}, {"resident": 1, "page": 1024}, {"resident": 3}])
@pytest.mark.parametrize("sizes", [(1000, 30), (150_000, 1, 90_000)])
def test_bytes_are_those_of_the_frames_and_of_a_step(tmp_path, knobs, sizes):
    technique = PagedAdam(**knobs)
    mine = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    ours = technique.over(mine, tmp_path)
    assert ours.pager.frames.nbytes == sum(term.bytes for term in technique.state_terms(sizes))
    for p in mine:
        p.grad = torch.ones_like(p)
    with Allocations([*mine, *(p.grad for p in mine)]) as seen:
        ours.step()
    stated = sum(term.bytes for term in technique.step_terms(sizes))
    of_frames = technique.page_bytes  # the page that is worked on, which the instrument meets as a tensor
    assert stated <= seen.peak - of_frames <= stated + 64  # and numbers of steps
    resident = Adam()
    theirs = resident.over(mine, tmp_path)
    theirs.step()
    with Allocations([*mine, *(p.grad for p in mine), *(x for s in theirs.state.values() for x in s.values())]) as seen:
        theirs.step()
    assert seen.peak == pytest.approx(sum(term.bytes for term in resident.step_terms(sizes)), abs=64)


@pytest.mark.parametrize(
    "knobs", [{"page": 3}, {"page": 0}, {"page": 6}, {"resident": 0}, {"resident": 1, "page": 2048}]
)
def test_knobs_out_of_range(knobs):
    with pytest.raises(InvalidInput):
        PagedAdam(**knobs)


RESIDENT_MEMORY = """
import sys, torch
from pathlib import Path
from barefoot.core.measure import PhaseMeter
from barefoot.optim.adamw import Adam
from barefoot.optim.paged import PagedAdam
torch.set_num_threads(1)
mine = [torch.nn.Parameter(torch.ones(64, 32768)), torch.nn.Parameter(torch.ones(2 << 20))]
for p in mine:
    p.grad = torch.ones_like(p)
kind = {"adamw": Adam(), "paged": PagedAdam(resident=3, page=256)}[sys.argv[1]]
small = torch.nn.Parameter(torch.ones(1 << 18))
small.grad = torch.ones_like(small)
warm = kind.over([small], Path(sys.argv[2]))
for _ in range(2):
    warm.step()
with PhaseMeter() as phase:
    optimizer = kind.over(mine, Path(sys.argv[2]))
    for _ in range(2):
        optimizer.step()
print(phase.result.added)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of phases are Linux's to tell")
def test_a_process_holds_a_tenth(tmp_path):
    """4 Mi numbers, 32 MiB of moments: what the system saw come, in a process of its own."""
    added = {}
    for kind in ("adamw", "paged"):
        done = subprocess.run(
            [sys.executable, "-c", RESIDENT_MEMORY, kind, str(tmp_path)], capture_output=True, text=True, check=True
        )
        added[kind] = int(done.stdout) / 2**20
    assert added["adamw"] >= 32
    assert 3.25 <= added["paged"] <= 3.25 + 1.5  # the pages, and the temporaries of a step
