"""KV policies and stores in transformers: the entries and logits of the engine, in the bytes that are there."""

import copy
import itertools
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch", reason="transformers needs torch")
transformers = pytest.importorskip("transformers", reason="the seam is that of transformers")

from barefoot.core.errors import Incompatible, InvalidInput  # noqa: E402
from barefoot.core.registry import techniques  # noqa: E402
from barefoot.drivers import attention  # noqa: E402
from barefoot.drivers.cache import RuledLayer  # noqa: E402
from barefoot.kv.stores import KVStore  # noqa: E402
from barefoot.ops import kvrows  # noqa: E402
from barefoot.plan.job import parse_kv  # noqa: E402
from barefoot.transformers import KVCache  # noqa: E402

POLICIES_KNOWN, STORES_KNOWN = techniques("kv.policies"), techniques("kv.stores")
IDS = np.random.default_rng(3).integers(0, 131, 130).tolist()
FLIPS = (
    0.05  # of a store's own error: codes that float32's last bits make fall the other way, one of a thousand at most
)
STRIKES, TWO_PARTS = "scissorhands(keep=24,window=9,recent=4)", "scissorhands(keep=24,window=30,recent=4,drop=10)"
POLICIES = (
    "sinks(keep=20)",
    "h2o(keep=24)",
    "h2o(keep=24,recent=0)",
    "snapkv(keep=24,window=6,room=100)",
    "scissorhands(keep=24,window=9,recent=4)",
    "scissorhands(keep=24,window=30,recent=4,drop=10)",
    "elastic(ratio=0.4)",
    "kvmerger(keep=24,room=100)",
    "kvmerger(keep=24,room=100,mass=bias)",
    "d2o(keep=24)",
    "d2o(keep=24,mass=bias)",
    "h2o(keep=24,layers=pyramid)",
)


@pytest.fixture(scope="module", params=["llama-gqa-4-1", "qwen3", "gemma3"])
def named(request):
    return request.param, tiny.build(request.param)


@pytest.fixture(scope="module")
def model(named):
    return named[1]


@pytest.fixture(scope="module")
def llama():
    return tiny.build("llama")


def rows(model, cache, *passes):
    """Logits of every token (n, vocabulary), passed in these parts."""
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([list(ids)]), past_key_values=cache).logits[0] for ids in passes]).numpy()


def singly(ids):
    return ([token] for token in ids)


def own_error(model, kv, *passes):
    """How much the rows of a store change logits, beside rows of float32."""
    policy, _, _ = kv.rpartition(" > ")
    exact = rows(model, KVCache(model, f"{policy} > f32" if policy else "f32"), *passes)
    return np.abs(rows(model, KVCache(model, kv), *passes) - exact).max()


class Halves(KVCache):
    """Prompts in half precision, as they stand in the engine while they pass."""

    def update(self, key_states, value_states, layer_idx, *more, **options):
        if isinstance(self.layers[layer_idx], RuledLayer) and key_states.shape[2] > 1:
            key_states, value_states = (x.half().float() for x in (key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *more, **options)


@pytest.mark.parametrize("kv", ["f32", "h2o(keep=200) > f32", "snapkv(keep=200) > f32", "scissorhands(keep=200) > f32"])
def test_where_all_stays_logits_are_those_of_any_cache(model, kv):
    """A prompt, tokens, a second prompt, tokens: against one pass without a cache."""
    expected = tiny.expected(model, IDS)
    got = rows(model, KVCache(model, kv), IDS[:60], *singly(IDS[60:70]), IDS[70:90], *singly(IDS[90:]))
    assert np.abs(got - expected).max() < 4e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kv", POLICIES)
def test_entries_and_logits_are_those_of_the_engine(named, tmp_path_factory, kv):
    """Through a prompt, 40 tokens, a second prompt and 10 tokens: every layer and key head, and every logit.

    Logits differ by less than what rounding all entries to half precision does: the engine rounds a prompt, where some
    numbers fall the other way than here, and what is merged of it once more.
    """
    name, model = named
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    cache = Halves(model, f"{kv} > f32")
    ruled = [i for i, layer in enumerate(cache.layers) if isinstance(layer, RuledLayer)]
    passes = [IDS[:60], *singly(IDS[60:100]), IDS[100:120], *singly(IDS[120:])]
    bound = own_error(model, f"{kv} > f16", *passes)
    with tiny.engine(folder, kv=parse_kv(f"{kv} > f32"), context=130, n_threads=1) as engine:
        for ids in passes:
            expected = (engine.prefill(ids) if len(ids) > 1 else engine.decode(ids[0])).copy()
            got = rows(model, cache, ids)[-1]
            assert np.abs(got - expected).max() < bound
            storage = engine._by_layer.caches[0].storage
            for number, layer in enumerate(ruled):
                there, waits = storage.position(number), storage.free[number]
                if waits[0] >= 0:  # slots of entries that went
                    there = [np.delete(own, gone) for own, gone in zip(there, waits, strict=True)]
                assert np.array_equal(cache.positions(layer)[0].numpy(), np.sort(there, axis=1))
    assert cache.get_seq_length() == 130
    assert cache.positions(ruled[-1]).shape[2] < 90


def test_budgets_that_are_measured_are_those_of_the_engine(tmp_path):
    """A layer with sharper attention than the others keeps less; entries and budgets of all layers."""
    model = tiny.build("llama")
    with torch.no_grad():
        attention_of = model.model.layers[1].self_attn  # all channels of a key alike, and so sharp
        attention_of.k_proj.weight[:] = attention_of.k_proj.weight[:1]
        attention_of.q_proj.weight *= 30
    model.save_pretrained(tmp_path)
    kv = "d2o(keep=40) > f32"
    cache = Halves(model, kv)
    rows(model, cache, IDS[:80])
    with tiny.engine(tmp_path, kv=parse_kv(kv), n_threads=1) as engine:
        engine.prefill(IDS[:80])
        storage = engine._by_layer.caches[0].storage
        for layer in range(3):
            assert np.array_equal(cache.positions(layer)[0].numpy(), np.sort(storage.position(layer), axis=1))
    kept = [cache.positions(layer).shape[2] for layer in range(3)]
    assert sum(kept) == 120
    assert kept[1] < 40 < kept[0]
    rows(model, cache, *singly(IDS[80:84]))
    assert [cache.positions(layer).shape[2] for layer in range(3)] == kept
    cache.reset()
    with pytest.raises(Incompatible, match="a budget for each sequence, got a batch of 2"):
        model(torch.tensor([IDS[:30], IDS[30:60]]), past_key_values=cache)


def test_what_is_drawn_of_a_prompt_is_drawn_alike(named, tmp_path):
    """Later ones are drawn by slot, which is another one there."""
    name, model = named
    model.save_pretrained(tmp_path)
    cache = KVCache(model, "random(keep=20,recent=5)")
    rows(model, cache, IDS[:60])
    ruled = [i for i, layer in enumerate(cache.layers) if isinstance(layer, RuledLayer)]
    with tiny.engine(tmp_path, kv=parse_kv("random(keep=20,recent=5)"), n_threads=1) as engine:
        engine.prefill(IDS[:60])
        storage = engine._by_layer.caches[0].storage
        for number, layer in enumerate(ruled):
            assert np.array_equal(cache.positions(layer)[0].numpy(), np.sort(storage.position(number), axis=1)), name
    rows(model, cache, *singly(IDS[60:70]))
    assert cache.positions(ruled[0]).shape[2] == 20
    assert (cache.positions(ruled[0])[..., -5:] == torch.arange(65, 70)).all()


POLICY_KNOBS = {"keep": 40, "window": 6, "recent": 8, "room": 60}
SMALL = {"kivi": "kivi(residual=32)", "comet": "comet(group=32)"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose head_dim of 16 all rows have, and no integer kernel, so that the engine computes in floats too."""
    folder, model = tmp_path_factory.mktemp("wide"), tiny.build("mistral-full")
    model.save_pretrained(folder)
    return folder, model


def runs_in_engine(folder, kv, steps):
    """What only the engine keeps: as many bytes as it states, and logits that depend on what comes."""
    with tiny.engine(folder, kv=kv, n_threads=1) as engine:
        found = [engine.prefill(IDS[:60]).copy(), *(engine.decode(token).copy() for token in steps)]
        stated = engine.footprint.select(kind="kv", phase="decode").bytes
        assert engine.arena.used_by_owner()["kv"] == stated
    assert np.isfinite(found).all()
    assert len({row.tobytes() for row in found}) == len(found)


@pytest.mark.parametrize(("policy", "store"), list(itertools.product(POLICIES_KNOWN, STORES_KNOWN)))
def test_every_policy_over_every_store_is_the_engines_or_refused(wide, policy, store):
    """Logits behind a prompt, and of 12 tokens (what is drawn among slots: of one, since slots are others there)."""
    folder, model = wide
    chosen = POLICIES_KNOWN[policy]
    knobs = {knob: value for knob, value in POLICY_KNOBS.items() if knob in chosen.knobs()}
    kv, steps = f"{chosen(**knobs)} > {SMALL.get(store, store)}", IDS[60:61] if policy == "random" else IDS[60:72]
    try:
        cache = Halves(model, kv)
    except Incompatible as refusal:
        assert policy in str(refusal) or store in str(refusal)  # noqa: PT017 - either outcome is allowed
        if "only the engine does" not in str(refusal):
            with pytest.raises(Incompatible):
                parse_kv(kv)
            return
        try:
            composition = parse_kv(kv)
        except Incompatible as other:
            assert policy in str(other) or store in str(other)  # noqa: PT017
            return
        runs_in_engine(folder, composition, steps)
        return
    passes = IDS[:60], *singly(steps)
    bound = FLIPS * own_error(model, kv, *passes) + own_error(model, "f16", *passes)
    with tiny.engine(folder, kv=parse_kv(kv), n_threads=1) as engine:
        expected = [engine.prefill(IDS[:60]).copy(), *(engine.decode(token).copy() for token in steps)]
    assert np.abs(rows(model, cache, *passes)[59:] - expected).max() < bound


def test_observing_tiles_changes_nothing(llama, monkeypatch):
    """What attention tells, of one query at a time and of all: against shares written out."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((6, 11), (3, 17)))
    scores = torch.einsum("bhtd,bhnd->bhtn", q, k.repeat_interleave(2, dim=1)).double() * 0.4
    shares = scores.masked_fill(~torch.ones(11, 17, dtype=torch.bool).tril(6), -torch.inf).softmax(-1)
    seen = torch.ones(11, 17).tril(6)
    struck = (shares.view(2, 3, 2, 11, 17).amax(2) < (1 / seen.sum(1))[:, None]) * seen
    expected = {
        "mass": shares.view(2, 3, 2, 11, 17).sum((2, 3)),
        "votes": shares.sum(2),
        "strikes": struck.sum(2).double(),
    }
    for tile in (1, 4 * 2 * 6 * 17 * 4, 1 << 20):
        monkeypatch.setattr(attention, "TILE_BYTES", tile)
        for what, values in expected.items():
            assert (attention.observe(what, q, k, 0.4).double() - values).abs().max() < 1e-5


def test_no_matrix_of_all_queries_by_all_keys(llama, monkeypatch):
    """The largest tensor that a pass makes: scores of a tile, not of 2,000 by 2,000 in four heads."""
    monkeypatch.setattr(attention, "TILE_BYTES", 1 << 20)
    ids = np.random.default_rng(0).integers(0, 131, 2000).tolist()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    with torch.inference_mode(), Watch():
        llama(torch.tensor([ids]), past_key_values=KVCache(llama, "h2o(keep=100)"), logits_to_keep=1)
    assert largest <= 1 << 20
    assert 4 * 4 * 2000 * 2000 > 60 << 20


def held(n, n_layers, heads, dim, store, *, observed=0):
    """Bytes of n entries of each layer and key head: two rows, a position, what is observed."""
    return n * n_layers * heads * (2 * kvrows.row_bytes(store, dim) + 4 + observed)


@pytest.mark.parametrize("store", ["f32", "f16", "q8", "q4", "q3", "q2", "bfp4"])
@pytest.mark.parametrize(
    ("policy", "n", "behind", "observed"),
    [
        ("sinks(keep=20)", 20, 20, 0),
        ("h2o(keep=24)", 24, 24, 4),
        ("snapkv(keep=24,window=6)", 24, 34, 0),
        ("kvmerger(keep=24,mass=bias)", 24, 34, 4),
        ("d2o(keep=24,layers=uniform,mass=bias)", 24, 24, 8),
        ("scissorhands(keep=24,window=9,recent=4)", 13, 23, 4),
        ("scissorhands(keep=24,window=30,recent=4,drop=10)", 15, 15, 28),
    ],
)
def test_bytes_of_rows(policy, n, behind, observed, store):
    """Behind a prompt of 60 tokens and behind 10 more: storages of all tensors, to the byte."""
    model = tiny.build("qwen3")  # 3 layers, 2 key heads of 24
    cache = KVCache(model, f"{policy} > {store}")
    carried = 3 * 8 if policy.startswith("d2o") else 0  # each layer's threshold
    rows(model, cache, IDS[:60])
    assert cache.bytes == held(n, 3, 2, 24, store, observed=observed) + carried
    rows(model, cache, *singly(IDS[60:70]))
    assert cache.bytes == held(behind, 3, 2, 24, store, observed=observed) + carried


def test_bytes_of_windows_and_batches():
    model = tiny.build("gemma3")  # 6 layers of 7 see 8 positions; 2 key heads of 16
    cache = KVCache(model, "h2o(keep=24) > q8")
    with torch.inference_mode():
        model(torch.tensor([IDS[:60]] * 3), past_key_values=cache)
        after_prompt = cache.bytes
        model(torch.tensor([[1]] * 3), past_key_values=cache)
    assert after_prompt == cache.bytes == 3 * (held(24, 1, 2, 16, "q8", observed=4) + held(7, 6, 2, 16, "q8"))


def test_bytes_of_sealed_entries(llama):
    """Of 100 entries with 32 that wait: 96 keys in 3 blocks, 64 values, and the others in half precision."""
    cache = KVCache(llama, "kivi(bits=2,group=32,residual=32)")
    rows(llama, cache, IDS[:90], *singly(IDS[90:100]))
    block, value, half = 4 * 12 + 32 * 16 * 2 // 8, kvrows.row_bytes("q2", 12), 24
    assert cache.bytes == 3 * 2 * (3 * block + 4 * half + 64 * value + 36 * half + 100 * 4)


def test_what_goes_is_freed(llama):
    """No tensor of the prompt's length is held by anything behind it."""
    cache = KVCache(llama, "snapkv(keep=24,window=6)")
    rows(llama, cache, IDS[:100])
    held_here = {part.untyped_storage().nbytes() for layer in cache.layers for part in layer.entries.parts.values()}
    assert max(held_here) == 2 * 24 * 24
    assert not attention.awaited


@pytest.mark.parametrize(
    "kv", ["h2o(keep=24) > f32", "snapkv(keep=24,window=6) > f32", "kivi(residual=32)", TWO_PARTS + " > f32"]
)
def test_sequences_of_a_batch_do_not_mix(model, kv):
    both = torch.tensor([IDS[:60], IDS[70:]])
    cache = KVCache(model, kv)
    alone = [KVCache(model, kv) for _ in both]
    bound = FLIPS * own_error(model, kv, IDS[:50], *singly(IDS[50:60]))
    with torch.inference_mode():
        for step in (slice(0, 50), *(slice(i, i + 1) for i in range(50, 60))):
            logits = model(both[:, step], past_key_values=cache).logits
            for own, ids, got in zip(alone, both, logits, strict=True):
                expected = model(ids[None, step], past_key_values=own).logits[0]
                assert (got - expected).abs().max() < max(bound, 4e-6 * expected.abs().max())
    for layer in range(len(cache)):
        expected = torch.cat([own.positions(layer) for own in alone])
        assert torch.equal(cache.positions(layer), expected)


@pytest.mark.parametrize("kv", ["h2o(keep=12) > q8", "snapkv(keep=12,window=4) > kivi(residual=32)", STRIKES])
def test_generate(model, kv):
    """Greedily, as token by token by hand; and again from there, with the answer and more behind it."""
    by_hand, cache = KVCache(model, kv), KVCache(model, kv)
    prompt, answer = torch.tensor([IDS[:30]]), []
    logits = rows(model, by_hand, IDS[:30])
    for _ in range(12):
        answer.append(int(logits[-1].argmax()))
        logits = rows(model, by_hand, answer[-1:])
    options = {"do_sample": False, "eos_token_id": None}
    found = model.generate(
        prompt, attention_mask=torch.ones(1, 30), past_key_values=cache, max_new_tokens=12, **options
    )
    assert found[0, 30:].tolist() == answer
    assert cache.get_seq_length() == 41  # the last token has not passed
    longer = torch.cat([found, torch.tensor([IDS[40:50]])], dim=1)
    mask = torch.ones(longer.shape)
    again = model.generate(longer, attention_mask=mask, past_key_values=cache, max_new_tokens=1, **options)
    other = KVCache(model, kv)
    expected = rows(model, other, IDS[:30], *singly(answer[:-1]), longer[0, 41:].tolist())
    assert again[0, -1] == expected[-1].argmax()


def test_beams(llama):
    """Beam search, whose sequences change places, finds what it finds without a cache where all stays."""
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 8, "eos_token_id": None}
    prompt = torch.tensor([IDS[:20], IDS[20:40]])
    options["attention_mask"] = torch.ones(prompt.shape)
    expected = llama.generate(prompt, use_cache=False, **options)
    assert torch.equal(
        llama.generate(prompt, past_key_values=KVCache(llama, "h2o(keep=90) > f32"), **options), expected
    )


def test_a_copy_goes_its_own_way(llama):
    cache = KVCache(llama, "h2o(keep=24) > q8")
    rows(llama, cache, IDS[:50])
    branch = copy.deepcopy(cache)
    first = rows(llama, cache, *singly(IDS[50:60]))
    assert not np.array_equal(rows(llama, branch, *singly(IDS[80:90])), first)
    branch.reset()
    assert branch.get_seq_length() == branch.bytes == 0
    rows(llama, branch, IDS[:50])
    assert np.array_equal(rows(llama, branch, *singly(IDS[50:60])), first)


def test_the_policy_matters(llama):
    """Entries of a policy that looks and of one that draws, as many: others, and other logits."""
    found = {}
    for kv in ("h2o(keep=24)", "random(keep=24)"):
        cache = KVCache(llama, kv)
        rows(llama, cache, IDS[:60])
        found[kv] = cache.positions(1), rows(llama, cache, [5])
    (own, logits), (drawn, others) = found.values()
    assert own.shape == drawn.shape
    assert not torch.equal(own, drawn)
    assert np.abs(logits - others).max() > 0.1


def test_other_caches_of_the_model_are_as_they_were(llama):
    before = tiny.expected(tiny.build("llama"), IDS)
    KVCache(llama, "h2o(keep=24)")
    got = rows(llama, transformers.DynamicCache(config=llama.config), IDS[:50], *singly(IDS[50:60]), IDS[60:])
    assert np.abs(got - before).max() < 4e-6 * np.abs(before).max()


def test_padding_is_refused(llama):
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    with pytest.raises(Incompatible, match="can't follow a mask"):
        llama(torch.tensor([IDS[:20], IDS[20:40]]), attention_mask=mask, past_key_values=KVCache(llama, "h2o"))


def test_attention_that_nobody_watches_is_refused(llama):
    cache = KVCache(llama, "h2o(keep=24)")
    llama.set_attn_implementation("sdpa")
    rows(llama, cache, IDS[:50])
    with pytest.raises(Incompatible, match="attention is not 'barefoot'"):
        rows(llama, cache, [1])


@pytest.mark.parametrize(
    ("kv", "error", "said"),
    [
        ("h2o > kivi", Incompatible, "can't go a few at a time"),
        ("h2o > sinks > f16", Incompatible, "one policy"),
        ("q3", Incompatible, "multiples of 8, got 12"),
        ("nothing", InvalidInput, "nothing"),
        ("sinks(rope=slot)", Incompatible, "turns queries to its first entries"),
        ("bfp4(sort=true)", Incompatible, "which only the engine does"),
        ("h2o > think", Incompatible, "keeps entries that are no rows"),
    ],
)
def test_compositions_that_do_not_go_together(llama, kv, error, said):
    with pytest.raises(error, match=said):
        KVCache(llama, kv)


def test_a_store_that_this_driver_does_not_know_is_refused(llama):
    @dataclass(frozen=True)
    class Shared(KVStore, name="shared"):
        row_format = "f16"
        rows = False

        def row_parts(self, head_dim):
            return (("values", head_dim, 2),)

    with pytest.raises(Incompatible, match="shared keeps entries that are no rows"):
        KVCache(llama, Shared())


def test_models_that_can_not_be_kept_this_way():
    small = {**tiny.COMMON, "head_dim": 12, "sliding_window": 8, "attn_logit_softcapping": 30.0}
    capped = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**small))
    with pytest.raises(Incompatible, match="caps the scores"):
        KVCache(capped, "f16")
    encoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=131, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    )
    with pytest.raises(Incompatible, match="no decoder"):
        KVCache(encoder, "f16")


def test_tokens_can_not_be_taken_back(llama):
    cache = KVCache(llama, "f16")
    rows(llama, cache, IDS[:20])
    with pytest.raises(Incompatible, match="don't come back"):
        cache.layers[0].crop(-1)


def test_the_engine_needs_neither_torch_nor_transformers():
    code = "import sys, barefoot.engine.runner, barefoot.plan.job; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
