"""The encoder against its docstring in numpy, and the laws of its parts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import encoder, layers
from jlora.models.encoder import Encoder, EncoderConfig, embed, mean_pool, run, split

CONFIG = EncoderConfig(
    vocab=13, layers=3, width=8, heads=2, ffn=12, max_positions=7, norm_eps=1e-6, init_std=0.5
)
IDS = jnp.asarray([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]], jnp.int32)
MASK = IDS > 0


@pytest.fixture(scope="module")
def params():
    # Everything random: with fresh norms and biases (1 and 0) the tests could not see them.
    shapes = jax.eval_shape(Encoder(CONFIG).init, jax.random.key(0), IDS, MASK)["params"]
    draw = np.random.default_rng(0).normal

    def leaf(path, like):
        scale = path[-1].key == "scale"
        return jnp.asarray(draw(float(scale), 0.2 if scale else 0.5, like.shape), like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@jax.jit
def _forward(params, ids, mask):
    return Encoder(CONFIG).apply({"params": params}, ids, mask)


_embed = jax.jit(lambda params, ids: embed(CONFIG, params, ids))
_run = jax.jit(lambda params, hidden, mask: run(params, hidden, mask, CONFIG))


def _norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def _dense(x, p):
    return x @ p["kernel"] + p["bias"]


def _numpy_encoder(params, ids, mask):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    erf = np.vectorize(math.erf)
    out = []
    for row, seen in zip(np.asarray(ids), np.asarray(mask), strict=True):
        e = p["embeddings"]
        h = e["word"]["embedding"][row] + e["position"]["embedding"][: len(row)]
        h = _norm(h + e["type"]["embedding"][0], e["norm"])
        for i in range(CONFIG.layers):
            layer = jax.tree.map(lambda x, i=i: x[i], p["layers"])
            a, f = layer["attention"], layer["ffn"]
            q, k, v = (_dense(h, a[name]).reshape(-1, 2, 4) for name in ("query", "key", "value"))
            mixed = np.zeros_like(q)
            for head in range(2):
                w = np.exp(q[:, head] @ k[:, head].T / 2.0) * seen
                mixed[:, head] = w / w.sum(-1, keepdims=True) @ v[:, head]
            u = _norm(h + _dense(mixed.reshape(h.shape), a["out"]), a["norm"])
            x = _dense(u, f["up"])
            h = _norm(u + _dense(x * 0.5 * (1 + erf(x / math.sqrt(2))), f["down"]), f["norm"])
        out.append(h)
    return np.stack(out)


def test_hidden_states_by_numpy(params):
    got = _forward(params, IDS, MASK)
    assert got.shape == (2, 5, 8) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, _numpy_encoder(params, IDS, MASK), atol=1e-5)


@pytest.mark.parametrize(
    ("part", "broken"),
    {
        "gelu": lambda x: jax.nn.gelu(x, approximate=True) * 1.001,
        "softmax": lambda x: jax.nn.softmax(x * 1.01, axis=-1),
        "mask_bias": lambda mask: jnp.zeros(mask.shape),
    }.items(),
)
def test_numpy_check_sees_a_broken_part(params, monkeypatch, part, broken):
    monkeypatch.setattr(layers, part, broken)
    got = jax.jit(lambda p: Encoder(CONFIG).apply({"params": p}, IDS, MASK))(params)
    assert float(np.abs(got - _numpy_encoder(params, IDS, MASK)).max()) > 1e-4


def test_parameter_tree_is_the_documented_one(params):
    d, f, n = CONFIG.width, CONFIG.ffn, CONFIG.layers

    def dense(i, o):
        return {"kernel": (n, i, o), "bias": (n, o)}

    norm = {"scale": (n, d), "bias": (n, d)}
    assert jax.tree.map(jnp.shape, params) == {
        "embeddings": {
            "word": {"embedding": (13, d)},
            "position": {"embedding": (7, d)},
            "type": {"embedding": (2, d)},
            "norm": {"scale": (d,), "bias": (d,)},
        },
        "layers": {
            "attention": {k: dense(d, d) for k in ("query", "key", "value", "out")}
            | {"norm": norm},
            "ffn": {"up": dense(d, f), "down": dense(f, d), "norm": norm},
        },
    }


def test_halves_compose_to_the_whole(params):
    whole = _forward(params, IDS, MASK)
    lower, upper = split(params, 1)
    assert set(upper) == {"layers"} and set(lower) == {"embeddings", "layers"}
    assert upper["layers"]["ffn"]["up"]["bias"].shape == (2, 12)
    middle = _run(lower, _embed(lower, IDS), MASK)
    np.testing.assert_allclose(_run(upper, middle, MASK), whole, atol=1e-5)
    # Cuts at the ends: no layer below, or none above (run is then the identity).
    np.testing.assert_array_equal(_run(split(params, 0)[0], middle, MASK), middle)
    np.testing.assert_array_equal(_run(split(params, 3)[1], middle, MASK), middle)


def test_padding_and_row_order_do_not_matter(params):
    whole = _forward(params, IDS, MASK)
    longer = jnp.pad(IDS, ((0, 0), (0, 2)), constant_values=9)
    padded = _forward(params, longer, jnp.pad(MASK, ((0, 0), (0, 2))))
    keep = np.asarray(MASK)
    np.testing.assert_allclose(np.asarray(padded[:, :5])[keep], np.asarray(whole)[keep], atol=1e-5)
    np.testing.assert_allclose(_forward(params, IDS[::-1], MASK[::-1]), whole[::-1], atol=1e-5)
    other = _forward(params, IDS.at[1, 3].set(8), MASK)[1]
    np.testing.assert_array_equal(other[:3], whole[1, :3])


def test_vmap_over_runs_is_a_loop_also_for_gradients(params):
    """A run is its own value kernel and its own rows over one shared base."""
    value = params["layers"]["attention"]["value"]["kernel"]
    own = jnp.stack([value, value * 0.5, value + 0.1])
    rows = jnp.stack([_embed(params, (IDS + i) % 13) for i in range(3)])
    attention = params["layers"]["attention"]

    def loss(kernel, hidden):
        mine = attention | {"value": attention["value"] | {"kernel": kernel}}
        out = run({"layers": params["layers"] | {"attention": mine}}, hidden, MASK, CONFIG)
        return jnp.sum(jnp.sin(out))

    step = jax.value_and_grad(loss, (0, 1))
    many = jax.jit(jax.vmap(step))(own, rows)
    one = jax.jit(step)
    for i in range(3):
        want = one(own[i], rows[i])
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4), many, want
        )


def test_frozen_base_costs_no_weight_gradient(params):
    """No matmul of the backward pass has the shape of a kernel, and none is saved a second time."""
    wide = EncoderConfig(vocab=3, layers=2, width=8, heads=2, ffn=12, max_positions=4)
    hidden, mask = jnp.ones((5, 3, 8)), jnp.ones((5, 3), bool)

    def text(argnums):
        def loss(hidden, weights):
            return jnp.sum(jnp.sin(run(weights, hidden, mask, wide)))

        weights = {"layers": jax.tree.map(lambda x: x[:2], params["layers"])}
        return str(jax.make_jaxpr(jax.grad(loss, argnums))(hidden, weights))

    dense = [f":f32[{i},{o}] = dot_general" for i, o in ((8, 8), (8, 12), (12, 8))]
    assert not any(d in text(0) for d in dense)
    assert any(d in text((0, 1)) for d in dense)


def test_mean_pool():
    hidden = jnp.asarray([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]], [[1.0, 1.0]] * 3])
    mask = jnp.asarray([[1, 1, 0], [0, 0, 0]], bool)

    @jax.jit
    def pool(hidden):
        y, back = jax.vjp(lambda h: mean_pool(h, mask), hidden)
        return y, back(jnp.ones_like(y))[0]

    y, grad = pool(hidden)
    np.testing.assert_allclose(y, [[0.6, 0.8], [0.0, 0.0]], atol=1e-6)
    # A row without tokens: zeros, and a gradient of zeros instead of NaN.
    assert np.isfinite(np.asarray(grad)).all() and not np.asarray(grad[1]).any()
    # Doubling every state changes nothing: only the direction is kept.
    np.testing.assert_allclose(pool(2 * hidden)[0], y, atol=1e-6)


def test_bfloat16_compute_over_float32_parameters(params):
    config = EncoderConfig(**{**vars(CONFIG), "dtype": "bfloat16"})
    got = jax.jit(lambda p: Encoder(config).apply({"params": p}, IDS, MASK))(params)
    assert got.dtype == jnp.bfloat16
    want = _forward(params, IDS, MASK)
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert 1e-5 < float(error) < 0.05


def test_errors_name_got_and_expected(params):
    long = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="got 8 tokens, expected <= 7"):
        embed(CONFIG, params, long)
    with pytest.raises(ValueError, match=r"mask: got bool\(2, 4\), expected bool\(2, 5\)"):
        Encoder(CONFIG).apply({"params": params}, IDS, MASK[:, :4])
    with pytest.raises(ValueError, match="mask: got int32"):
        run(params, embed(CONFIG, params, IDS), IDS, CONFIG)
    with pytest.raises(ValueError, match="got k=4, expected 0 <= k <= 3"):
        split(params, 4)
    with pytest.raises(ValueError, match="width 8 is not a multiple of heads 3"):
        EncoderConfig(**{**vars(CONFIG), "heads": 3})


def test_one_import_serves_the_whole_interface():
    assert all(callable(getattr(encoder, name)) for name in encoder.__all__)
