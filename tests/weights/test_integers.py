"""Networks in integers: the same numbers as a simulation in double precision, and close to the real network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from barefoot.core.errors import InvalidInput
from barefoot.weights import ranges
from barefoot.weights.integers import encoder, network
from barefoot.weights.integers.dyadic import dyadic, rescale
from barefoot.weights.integers.functions import Exponential, Gelu, normalized, softmax, square_root
from barefoot.weights.integers.simulated import convolution, simulate

pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Watched(np.ndarray):
    """An array that refuses to take part in any computation with real numbers."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        def plain(x):
            return x.view(np.ndarray) if isinstance(x, Watched) else x

        if out is not None:
            kwargs["out"] = tuple(map(plain, out))
        result = getattr(ufunc, method)(*map(plain, inputs), **kwargs)
        for x in (*inputs, *(result if isinstance(result, tuple) else (result,))):
            assert np.asarray(x).dtype.kind in "iub", f"{ufunc.__name__} computes with {np.asarray(x).dtype}"
        return result.view(Watched) if isinstance(result, np.ndarray) else result


# Dyadic numbers


def test_factors_are_met_and_rounding_is_half_upwards():
    reals = np.array([0.3, 1e-6, 1.0, 700.0])
    np.testing.assert_allclose(dyadic(reals).values, reals, rtol=2.0**-23)
    half = dyadic(0.5)
    np.testing.assert_array_equal(rescale(np.array([-3, -1, 1, 3]), half), [-1, 0, 1, 2])
    sums = np.random.default_rng(0).integers(-(1 << 28), 1 << 28, 10000)
    by = dyadic(1.7e-5)
    np.testing.assert_array_equal(rescale(sums, by), np.floor(sums * float(by.values) + 0.5))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, 2.0**24])
def test_factors_out_of_range(bad):
    with pytest.raises(InvalidInput, match="factors lie above 0"):
        dyadic([1.0, bad])


# Functions


def test_square_root_is_exact():
    n = np.concatenate([np.arange(2000), np.random.default_rng(0).integers(0, 1 << 62, 2000)])
    assert square_root(n).tolist() == [math.isqrt(int(x)) for x in n]


def test_exponential_and_softmax():
    scale = 1e-3
    q = -np.arange(0, 9000, 7)
    exp = Exponential(scale)
    # The polynomial is off by 0.0019 at most (I-BERT, section 3.5), and its integers by a few of their units.
    np.testing.assert_allclose(exp(q) * exp.out_scale, np.exp(q * scale), atol=0.003)
    x = np.random.default_rng(0).normal(0, 3, (50, 30))
    expected = torch.softmax(torch.from_numpy(x), -1).numpy()
    np.testing.assert_allclose(
        softmax(np.rint(x / scale).astype(np.int64), exp) / 256, expected, atol=0.003 * 3 + 1 / 256
    )


def test_gelu():
    scale = 5e-4
    q = np.arange(-20000, 20001, 13)
    gelu = Gelu(scale)
    expected = torch.nn.functional.gelu(torch.from_numpy(q * scale)).numpy()
    # 0.018 is the polynomial's largest error (I-BERT, table 1).
    np.testing.assert_allclose(gelu(q) * gelu.out_scale, expected, atol=0.019)
    assert np.abs(gelu(np.array([-32767, 32767]))).max() < 1 << 31


def test_layer_norm():
    x = np.random.default_rng(0).normal(30, 900, (20, 384))
    q = np.rint(x).astype(np.int64)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(q.astype(np.float64)), (384,)).numpy()
    np.testing.assert_allclose(normalized(q) / 1024, expected, atol=0.002)
    constant = normalized(np.full((1, 8), 77))
    assert not constant.any()


# Convolutional networks


def small_network(seed=0):
    """Every kind of node: strides, depthwise, residual sum, ReLU6, no activation, mean, head."""
    rng = np.random.default_rng(seed)

    def product(name, source, out, k, size, **kwargs):
        weight = rng.standard_normal((out, k, k, size)).astype(np.float32) * (2 / (k * k * size)) ** 0.5
        weight *= rng.lognormal(0, 0.8, (out, 1, 1, 1)).astype(np.float32)
        return network.Product(name, source, weight, rng.normal(0, 0.2, out).astype(np.float32), **kwargs)

    return (
        product("stem", "input", 8, 3, 3, stride=2, cap=6.0),
        product("expand", "stem", 24, 1, 8, cap=6.0),
        product("depth", "expand", 24, 3, 1, depthwise=True, cap=np.inf),
        product("project", "depth", 8, 1, 24),
        network.Sum("add", ("project", "stem")),
        product("down", "add", 16, 5, 8, stride=2, cap=6.0),
        network.Mean("pool", "down"),
        product("head", "pool", 10, 1, 16),
    )


def images(n, seed=1, size=13):
    return np.random.default_rng(seed).normal(0, 1, (n, size, size, 3)).astype(np.float32)


def torch_run(nodes, x):
    values = {"input": torch.from_numpy(x).double()}
    for node in nodes:
        if isinstance(node, network.Product):
            y = convolution(node, values[node.source]) + torch.from_numpy(node.bias)
            values[node.name] = y if node.cap is None else y.clip(0, node.cap)
        elif isinstance(node, network.Sum):
            values[node.name] = values[node.sources[0]] + values[node.sources[1]]
        else:
            values[node.name] = values[node.source].mean((1, 2), keepdim=True)
    return values[nodes[-1].name].numpy()


@pytest.fixture(scope="module")
def converted():
    nodes = small_network()
    return nodes, network.convert(nodes, network.calibrate(nodes, [images(32), images(32, 2)]))


def test_the_real_network_is_torch_s():
    nodes = small_network()
    np.testing.assert_allclose(network.run(nodes, images(4)), torch_run(nodes, images(4)), rtol=1e-4, atol=1e-4)


def test_integers_equal_the_simulation_bit_for_bit_on_1000_images(converted):
    net = converted[1]
    x = images(1000, 3, size=9)
    codes = net.input.encode(x)
    found = net.run(codes)
    np.testing.assert_array_equal(found, simulate(net, codes))
    assert len(np.unique(found)) > 100


def test_nothing_but_integers(converted):
    net = converted[1]
    codes = net.input.encode(images(3))
    watched = net.run(codes.view(Watched))
    assert isinstance(watched, Watched)
    np.testing.assert_array_equal(watched.view(np.ndarray), net.run(codes))
    with pytest.raises(AssertionError, match="computes with float"):
        _ = codes.view(Watched) * 0.5


def test_the_watch_sees_every_computation(converted, monkeypatch):
    """The imitation: 8-bit codes that are multiplied as real numbers."""
    monkeypatch.setattr(network, "rescale", lambda sums, by: np.floor(sums * by.values + 0.5).astype(np.int64))
    with pytest.raises(AssertionError, match="computes with float"):
        converted[1].run(converted[1].input.encode(images(1)).view(Watched))


def cosine(a, b):
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())


def test_close_to_the_real_network_and_channels_beat_tensors(converted):
    nodes, net = converted
    x = images(64, 5)
    real = network.run(nodes, x)
    by_tensor = network.convert(nodes, network.calibrate(nodes, [images(32), images(32, 2)]), per_channel=False)
    error = {
        name: float(((n.output.decode(n.run(n.input.encode(x))) - real) ** 2).mean())
        for name, n in (("channel", net), ("tensor", by_tensor))
    }
    assert cosine(net.output.decode(net.run(net.input.encode(x))), real) > 0.995
    assert error["channel"] < 0.6 * error["tensor"]


def test_bytes(converted):
    nodes, net = converted
    n_weights = sum(n.weight.size for n in nodes if isinstance(n, network.Product))
    n_channels = sum(len(n.bias) for n in nodes if isinstance(n, network.Product))
    assert net.n_bytes == n_weights + (4 + 5) * n_channels + 2 * 5 + 5


def test_a_channel_without_weights_keeps_its_bias():
    weight = np.ones((2, 1, 1, 1), np.float32)
    weight[1] = 1e-9
    nodes = (network.Product("only", "input", weight, np.array([0, 0.5], np.float32)),)
    net = network.convert(nodes, {"input": (-1.0, 1.0), "only": (-1.0, 1.0)})
    y = net.output.decode(net.run(net.input.encode(np.full((1, 1, 1, 1), 0.25, np.float32))))
    np.testing.assert_allclose(y.reshape(-1), [0.25, 0.5], atol=1 / 127)


def test_a_missing_range_is_named():
    with pytest.raises(InvalidInput, match="no range of stem, expand"):
        network.convert(small_network()[:2], {"input": (-1.0, 1.0)})


def test_batch_norm_folds_into_the_convolution_before_it():
    rng = np.random.default_rng(0)
    node = small_network()[0]
    norm = torch.nn.BatchNorm2d(8, eps=1e-3).double().eval()
    for t in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        t.copy_(torch.from_numpy(rng.uniform(0.5, 2, 8)))
    parts = [
        t.detach().numpy().astype(np.float32) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    ]
    weight, bias = network.with_norm(node.weight, *parts, 1e-3)
    x = images(2)
    plain = convolution(node, torch.from_numpy(x).double()).permute(0, 3, 1, 2)
    expected = norm(plain).detach().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(network.convolve(x, weight, 2, False) + bias, expected, rtol=1e-4, atol=1e-5)


# An encoder layer

D, HEADS, FFN = 32, 4, 64


@pytest.fixture(scope="module")
def bert():
    """A BERT layer of transformers, its inputs, the largest magnitude of every value, and its outputs."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    torch.manual_seed(0)
    config = BertConfig(hidden_size=D, num_attention_heads=HEADS, intermediate_size=FFN, attn_implementation="eager")
    layer = BertLayer(config).eval()
    for p in layer.parameters():
        if p.dim() == 2:
            p.data.mul_(8)
    x = torch.nn.functional.layer_norm(torch.randn(40, 12, D), (D,))
    with torch.no_grad():
        y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    a = layer.attention
    pairs = {
        "query": a.self.query,
        "key": a.self.key,
        "value": a.self.value,
        "attention": a.output.dense,
        "attention_norm": a.output.LayerNorm,
        "up": layer.intermediate.dense,
        "down": layer.output.dense,
        "output_norm": layer.output.LayerNorm,
    }
    weights = {name: (m.weight.detach().numpy(), m.bias.detach().numpy()) for name, m in pairs.items()}
    return weights, x.numpy(), y.numpy()


def reference_values(weights, x):
    """Every value of the layer in double precision, by name."""
    w = {name: tuple(torch.from_numpy(t).double() for t in pair) for name, pair in weights.items()}
    v = {"input": torch.from_numpy(x).double()}

    def linear(name, t):
        return torch.nn.functional.linear(t, *w[name])

    for name in ("query", "key", "value"):
        v[name] = linear(name, v["input"])
    q, k, val = (v[n].reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2) for n in ("query", "key", "value"))
    p = torch.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(D // HEADS), -1)
    v["context"] = (p @ val).swapaxes(1, 2).reshape(x.shape)
    v["attention_sum"] = linear("attention", v["context"]) + v["input"]
    v["attention_norm"] = torch.nn.functional.layer_norm(v["attention_sum"], (D,), *w["attention_norm"])
    v["up"] = linear("up", v["attention_norm"])
    v["gelu"] = torch.nn.functional.gelu(v["up"])
    v["output_sum"] = linear("down", v["gelu"]) + v["attention_norm"]
    v["output_norm"] = torch.nn.functional.layer_norm(v["output_sum"], (D,), *w["output_norm"])
    return {name: t.numpy() for name, t in v.items()}


@pytest.fixture(scope="module")
def layer(bert):
    weights, x, y = bert
    values = reference_values(weights, x)
    np.testing.assert_allclose(values["output_norm"], y, atol=1e-4)
    return encoder.convert_layer(weights, HEADS, {name: float(np.abs(v).max()) for name, v in values.items()})


def test_an_encoder_layer_in_integers_is_close_to_transformers(bert, layer):
    _, x, y = bert
    found = layer.run(encoder.encode(x, layer.scales["input"])) * layer.scales["output_norm"]
    assert cosine(found, y) > 0.995
    # Most of what is left is the 8 bits of the result itself and of its input: a few units.
    assert np.abs(found - y).mean() < 3 * layer.scales["output_norm"]


def test_an_encoder_layer_computes_with_nothing_but_integers(bert, layer):
    codes = encoder.encode(bert[1][:3], layer.scales["input"])
    watched = layer.run(codes.view(Watched))
    assert isinstance(watched, Watched)
    np.testing.assert_array_equal(watched.view(np.ndarray), layer.run(codes))


def test_an_encoder_layer_equals_its_simulation_in_double_precision(bert, layer):
    """Every division, shift and square root of the integers as floor, power and root of real numbers."""

    def half_up(x):
        return np.floor(x + 0.5)

    def limited(x, bits):
        return np.clip(x, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)

    def linear(name, t, bits):
        m = layer.matrices[name]
        return limited(half_up((t @ m.weight.T.astype(np.float64) + m.bias) * m.by.values), bits)

    def norm(name, r):
        finer = r * 16
        centred = finer - np.floor((finer.sum(-1, keepdims=True) + D // 2) / D)
        spread = np.floor(np.sqrt(np.floor((centred**2).sum(-1, keepdims=True) / D)))
        unit = np.floor((centred * 2048 + spread) / (2 * spread))
        n = layer.norms[name]
        return limited(half_up((unit * n.scale + n.shift) * n.by.values), 8)

    codes = encoder.encode(bert[1], layer.scales["input"])
    x = codes.astype(np.float64)
    q, k, v = (linear(n, x, 8).reshape(40, 12, HEADS, -1).swapaxes(1, 2) for n in ("query", "key", "value"))
    scores = q @ k.swapaxes(-1, -2)
    below = scores - scores.max(-1, keepdims=True)
    ln2, b, c = layer.exponential.constants
    z = np.floor(-below / ln2)
    powers = np.floor(((below + z * ln2 + b) ** 2 + c) / np.exp2(np.minimum(z, 62)))
    p = np.floor(powers * 256 / powers.sum(-1, keepdims=True))
    mixed = limited(half_up((p @ v) * layer.context.values), 8).swapaxes(1, 2).reshape(x.shape)
    r = linear("attention", mixed, 16) + half_up(x * layer.residuals["attention_sum"].values)
    y = norm("attention_norm", r)
    up = linear("up", y, 16)
    b, one, shift = layer.gelu.constants
    erf = np.sign(up) * (one - (np.minimum(np.abs(up), b) - b) ** 2)
    gelu = up * np.floor((one + erf) / 2**shift)
    hidden = limited(half_up(gelu * layer.after_gelu.values), 8)
    r = linear("down", hidden, 16) + half_up(y * layer.residuals["output_sum"].values)
    np.testing.assert_array_equal(layer.run(codes), norm("output_norm", r))


def test_bytes_of_an_encoder_layer(layer):
    n_weights, n_rows = 4 * D * D + 2 * D * FFN, 5 * D + FFN
    assert layer.n_bytes == n_weights + (4 + 5) * n_rows + 2 * ((2 + 4) * D + 5)


def test_what_an_encoder_layer_lacks_is_named(bert):
    with pytest.raises(InvalidInput, match="needs input, query"):
        encoder.convert_layer(bert[0], HEADS, {})


def test_calibration_takes_any_range():
    nodes = small_network()
    wide = network.calibrate(nodes, [images(16)])
    narrow = network.calibrate(nodes, [images(16)], lambda x: ranges.percentile(x, 99))
    assert all(narrow[n][1] - narrow[n][0] < wide[n][1] - wide[n][0] for n in ("input", "project", "add"))
