"""fit, eval and compare as people run them, on a tiny model."""

import json
import math

import numpy as np
import pytest

from barefoot.cli.commands import all_commands
from barefoot.cli.commands import fit as fit_command
from barefoot.core.errors import OverBudget
from barefoot.engine.fitting import Fit
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.ops import blocks
from barefoot.weights.solvers.gptq import Gptq


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = np.random.default_rng(0).integers(97, 123, (900, 6)).astype(np.uint8)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(bytes(word).decode() for word in words))
    return path


@pytest.fixture(scope="module")
def small(barefoot, tiny_gguf, text, tmp_path_factory):
    """The tiny model at 4 bits a weight, and the record of the fit."""
    folder = tmp_path_factory.mktemp("fits")
    command = ["fit", tiny_gguf.path, "--bits", 5, "-o", folder / "small", "--text", text, "--window", 64]
    done = barefoot(*command, "--tokens", 512, "--json", folder / "fit.json")
    assert done.returncode == 0, done.stderr
    return folder / "small", json.loads((folder / "fit.json").read_text())


def test_a_fit_takes_the_bytes_that_were_asked_for(small, tiny_gguf):
    folder, record = small
    assert set(record) == set(all_commands()["fit"].JSON_KEYS)
    with Checkpoint(folder) as checkpoint:
        spec = model_spec(checkpoint)
        stored = sum(info.n_bytes for info in checkpoint.tensors.values())
    assert record["weight_bytes"] == stored == sum(record["formats"].values())
    assert 0.9 * 5 < record["bits_per_weight"] <= 5
    assert spec.n_parameters == tiny_gguf.n_matrix_weights + 5 * tiny_gguf.d_model
    assert record["predicted_cost"] > 0


def test_a_fitted_model_runs_in_the_memory_that_its_fit_names(small, barefoot, tmp_path):
    folder, record = small
    command = ["run", folder, "he", "--memory", record["run_bytes"], "--context", 512, "--max-tokens", 4]
    done = barefoot(*command, "--json", tmp_path / "run.json")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["measured_peak_bytes"] is None or run["measured_peak_bytes"] <= record["run_bytes"]


def test_stated_formats_are_kept(barefoot, tiny_gguf, tmp_path):
    command = ["fit", tiny_gguf.path, "--weights", "ffn=int(bits=3,group=64) attn=stored", "--solver", "hqq"]
    assert barefoot(*command, "-o", tmp_path / "out").returncode == 0
    with Checkpoint(tmp_path / "out") as checkpoint:
        formats = {w.name.split(".")[-1]: w.format for w in model_spec(checkpoint).weights if w.group != "norm"}
    assert formats == {
        "embed": "q8_0",
        **dict.fromkeys("qkvo", "q4_0"),
        **dict.fromkeys(("gate", "up", "down"), "int3_g64_asym"),
    }


def test_a_stack_is_fitted_and_sorted_within_what_was_predicted(barefoot, tiny_gguf, text, tmp_path):
    command = ["fit", tiny_gguf.path, "--weights", "ffn=bitstack(blocks=3) attn=spqr", "--text", text, "--window", 128]

    def fit(memory, name):
        return barefoot(*command, "--fit-memory", memory, "-o", tmp_path / name, "--json", tmp_path / "fit.json")

    assert fit("100MiB", "out").returncode == 0
    record = json.loads((tmp_path / "fit.json").read_text())
    predicted, measured = record["predicted_peak_bytes"], record["measured_peak_bytes"]
    assert measured is None or predicted - (16 << 20) < measured <= predicted
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert len(model_spec(checkpoint).stack) == tiny_gguf.n_layers * 3 * 2
    refused = fit(predicted - (4 << 20), "less")
    assert refused.returncode == 3
    assert "--fit-memory" in refused.stderr
    assert not (tmp_path / "less" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "one of the arguments --memory --bits --weights is required"),
        (["--bits", "1"], 3, "the smallest options take"),
        (["--bits", "4", "--solver", "gptk"], 2, "gptq"),
        (["--weights", "int(bits=4,group=128)"], 4, "groups of 32 or 64"),
    ],
)
def test_what_cannot_be_fitted_is_said(arguments, code, says, barefoot, tiny_gguf, text, tmp_path):
    done = barefoot("fit", tiny_gguf.path, "-o", tmp_path / "out", "--text", text, "--window", 64, *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_eval_agrees_with_the_logits(small, barefoot, tiny_gguf, text, tmp_path):
    """Perplexity and divergence from logits of our own, taken from the engine window by window."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
    from tiny import all_logits, engine

    from barefoot.evals.scoring import text_windows
    from barefoot.io.tokenizer import load_tokenizer

    folder, _ = small
    command = ["eval", folder, "--reference", tiny_gguf.path, "--text", text, "--window", 32, "--tokens", 96]
    done = barefoot(*command, "--kv", "f32", "--json", tmp_path / "eval.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "eval.json").read_text())
    assert set(record) == set(all_commands()["eval"].JSON_KEYS)
    with Checkpoint(tiny_gguf.path) as checkpoint:
        windows = text_windows(text.read_text(), load_tokenizer(checkpoint), 32, 96)
    logs = {}
    for path in (folder, tiny_gguf.path):
        with engine(path) as run:
            rows = []
            for ids in windows:
                run.reset()
                rows.append(all_logits(run, ids)[16:-1])
        x = np.concatenate(rows).astype(np.float64)
        logs[path] = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    targets = np.concatenate([ids[17:] for ids in windows])
    p, q = logs[tiny_gguf.path], logs[folder]
    assert record["n_tokens"] == len(targets) == 3 * 15
    assert record["kl_mean"] == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-3)
    assert record["perplexity"] == pytest.approx(math.exp(-q[np.arange(len(targets)), targets].mean()), rel=1e-4)


def test_pytorch_scores_a_folder_as_the_engine_does(small, barefoot, tiny_gguf, text, tmp_path):
    pytest.importorskip("transformers", reason="the PyTorch driver runs transformers' modules")
    folder, fit = small
    command = ["eval", folder, "--text", text, "--window", 32, "--tokens", 96, "--reference", folder]
    found = {}
    for driver in ("engine", "torch"):
        done = barefoot(*command, "--driver", driver, "--json", tmp_path / "eval.json")
        assert done.returncode == 0, done.stderr
        found[driver] = json.loads((tmp_path / "eval.json").read_text())
        assert found[driver]["driver"] == driver
    assert 0 <= found["torch"]["kl_mean"] < 1e-6
    assert found["torch"]["perplexity"] == pytest.approx(found["torch"]["reference_perplexity"], rel=1e-4)
    assert found["torch"]["n_tokens"] == found["engine"]["n_tokens"]
    # Stored bytes and a few frequencies: nothing became floats.
    assert 0 <= found["torch"]["weight_bytes"] - fit["weight_bytes"] < 1000

    for arguments, says in (
        ([folder, "--driver", "torch", "--memory", "1GiB"], "--memory says how the engine computes"),
        ([tiny_gguf.path, "--driver", "torch"], "is no folder that transformers reads"),
    ):
        done = barefoot("eval", *arguments, "--text", text, "--window", 32)
        assert done.returncode in (2, 4)
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_compare_measures_formats_and_what_to_expect_of_a_fit(barefoot, tiny_gguf, text, tmp_path):
    out = tmp_path / "compare.json"
    command = ["compare", tiny_gguf.path, "--formats", "int[48]_g64_asym", "--memory", 48_000, "--text", text]
    done = barefoot(*command, "--tokens", 1024, "--fit-tokens", 1024, "--keep", tmp_path / "fits", "--json", out)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert set(record) == set(all_commands()["compare"].JSON_KEYS)
    points = {point["name"]: point for point in record["points"]}
    n, vectors = tiny_gguf.n_matrix_weights, 4 * 5 * tiny_gguf.d_model
    for bits in (4, 8):
        assert points[f"int{bits}_g64_asym"]["n_bytes"] == vectors + n // 64 * blocks.block_bytes(f"int{bits}_g64_asym")
    assert points["int4_g64_asym"]["kl"] > points["int8_g64_asym"]["kl"] > 0
    fits = sorted((p for p in record["points"] if p["name"].startswith("fit")), key=lambda p: p["n_bytes"])
    assert len(fits) == 4
    assert fits[0]["n_bytes"] < 48_000 < fits[-1]["n_bytes"]
    assert fits[-1]["kl"] < record["expected"]["kl"] < fits[0]["kl"]


def test_what_was_begun_goes_on_though_another_solver_has_room_now(monkeypatch):
    texts = np.zeros((2, 512), np.int32)
    jobs = [Fit({"embed": "int4_g32_asym"}, Gptq(), texts), Fit({"embed": "int4_g32_asym"}, Gptq(drift=0), texts)]
    monkeypatch.setattr(fit_command, "_peak", lambda reserved, spec, job: (100, "the fit"))
    assert fit_command._within(100, 0, None, jobs, lambda job: False) is jobs[0]
    begun = fit_command._within(100, 0, None, jobs, lambda job: not job.solver.drift and job.texts.shape == (4, 256))
    assert (begun.solver, begun.texts.shape) == (Gptq(drift=0), (4, 256))
    with pytest.raises(OverBudget, match="the fit takes 100"):
        fit_command._within(99, 0, None, jobs, lambda job: False)
