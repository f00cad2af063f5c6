"""The pixel DiT: the same numbers in torch, adapters on all its linear layers, what it returns."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.models import dit
from jlora.models.dit.model import places

torch = pytest.importorskip("torch", reason="torch is a test-only requirement (Python 3.11)")
F = torch.nn.functional

CONFIG = dit.DiTConfig(
    styles=3, words=7, patch=2, channels=3, width=8, depth=2, heads=2, ffn=12, rank=3
)
PLAIN = dit.DiTConfig(
    styles=3, words=7, patch=2, channels=3, width=8, depth=2, heads=2, ffn=12, rank=0, qk_norm=False
)
PICTURE = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
TIME = jnp.float32(0.3)
NAMED = dit.Condition(jnp.int32(2), jnp.asarray([4, 1, 0], jnp.int32))


@functools.cache
def params(config):
    """Parameters that are all far from zero and one."""
    shapes = jax.eval_shape(lambda: dit.init(jax.random.key(0), config))
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: random.normal(0, 0.4, x.shape).astype(np.float32), shapes)


@functools.cache
def jitted(config):
    run = jax.jit(functools.partial(dit.forward, config=config, features=True, maps=True))
    return lambda *given, null=False: run(*given, np.bool_(null))


def by_torch(p, picture, time, style, words, config):
    """The equations of the docstrings, in float64."""
    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x), dtype=torch.float64), p)
    d, heads, size = config.width, config.heads, config.patch
    linear = lambda x, leaves: F.linear(x, leaves["kernel"].T, leaves["bias"])  # noqa: E731
    norm = lambda x: F.layer_norm(x, (d,), eps=1e-6)  # noqa: E731

    def wave(x, width):
        powers = [10_000.0 ** (-i / (width // 2)) for i in range(width // 2)]
        return [np.cos(x * w) for w in powers] + [np.sin(x * w) for w in powers]

    def attention(leaves, x, source):
        split = lambda y: y.reshape(len(y), heads, -1).transpose(0, 1)  # noqa: E731
        q, k, v = (split(linear(y, leaves[n])) for y, n in
                   ((x, "query"), (source, "key"), (source, "value")))  # fmt: skip
        if "q_norm" in leaves:
            q = F.rms_norm(q, (d // heads,), leaves["q_norm"]["scale"], 1e-6)
            k = F.rms_norm(k, (d // heads,), leaves["k_norm"]["scale"], 1e-6)
        y = F.scaled_dot_product_attention(q, k, v)
        return linear(y.transpose(0, 1).reshape(len(x), d), leaves["out"])

    rows, columns = picture.shape[0] // size, picture.shape[1] // size
    z = torch.tensor(picture, dtype=torch.float64)
    patches = [z[size * i : size * (i + 1), size * j : size * (j + 1)].reshape(-1)
               for i in range(rows) for j in range(columns)]  # fmt: skip
    where = [wave(i, d // 2) + wave(j, d // 2) for i in range(rows) for j in range(columns)]
    x = linear(torch.stack(patches), p["patch"]) + torch.tensor(where)
    c = linear(F.silu(linear(torch.tensor(wave(1000 * time, d), dtype=torch.float64),
                             p["time"]["up"])), p["time"]["down"])  # fmt: skip
    c = c + p["style"]["embedding"][style]
    w = torch.stack([p["empty"], *(p["word"]["embedding"][n] for n in words)])
    for n in range(config.depth):
        leaves = jax.tree.map(lambda leaf, n=n: leaf[n], p["blocks"])
        own, s = leaves["modulation"], F.silu(c)
        m = (linear(s, own) if config.rank == 0 else
             linear(s, p["modulation"]) + linear(linear(s, own["down"]), own["up"]))  # fmt: skip
        b1, g1, a1, b2, g2, a2 = m.split(d)
        y = (1 + g1) * norm(x) + b1
        x = x + a1 * attention(leaves["attention"], y, y)
        x = x + attention(leaves["cross"], norm(x), w)
        y = (1 + g2) * norm(x) + b2
        ffn = leaves["ffn"]
        x = x + a2 * linear(F.gelu(linear(y, ffn["up"]), approximate="tanh"), ffn["down"])
    shift, scale = linear(F.silu(c), p["last"]["modulation"]).split(d)
    out = linear((1 + scale) * norm(x) + shift, p["last"]["out"])
    picture = np.zeros(picture.shape)
    for n, token in enumerate(out.numpy()):
        i, j = divmod(n, columns)
        square = token.reshape(size, size, -1)
        picture[size * i : size * (i + 1), size * j : size * (j + 1)] = square
    return picture


@pytest.mark.parametrize("config", [CONFIG, PLAIN])
def test_velocity_is_that_of_torch(config):
    p = params(config)
    ours = jitted(config)(p, PICTURE, TIME, NAMED).velocity
    theirs = by_torch(p, PICTURE, 0.3, 2, [4, 1], config)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
    other = by_torch(p, PICTURE, 0.3, 2, [1, 4, 5], config)  # the parity would see a wrong name
    assert np.abs(ours - other).max() > 1e-2


def test_null_leaves_style_and_name_out():
    p = params(CONFIG)
    got = jitted(CONFIG)(p, PICTURE, TIME, NAMED, null=True).velocity
    want = by_torch(p, PICTURE, 0.3, 0, [], CONFIG)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_maps_and_features_on_request():
    p = params(CONFIG)
    out = jitted(CONFIG)(p, PICTURE, TIME, NAMED)
    assert out.features.shape == (2, 6, 8)
    assert out.attention.shape == (2, 2, 6, 6) and out.cross.shape == (2, 2, 6, 4)
    np.testing.assert_allclose(out.attention.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(out.cross[..., 3], 0.0)  # padding is not seen
    assert (np.asarray(out.cross[..., :3]) > 0).all()
    shapes = jax.eval_shape(functools.partial(dit.forward, config=CONFIG), p, PICTURE, TIME, NAMED)
    assert shapes.features is shapes.attention is shapes.cross is None


def test_order_of_words_does_not_matter_and_places_do():
    p = params(CONFIG)
    run = jitted(CONFIG)
    turned = NAMED._replace(words=jnp.asarray([0, 1, 4], jnp.int32))
    np.testing.assert_allclose(
        run(p, PICTURE, TIME, turned).velocity, run(p, PICTURE, TIME, NAMED).velocity, rtol=1e-4,
        atol=1e-5,
    )  # fmt: skip
    table = np.asarray(places(2, 3, 8))
    assert len({row.tobytes() for row in table}) == 6
    flipped = run(p, PICTURE[::-1].copy(), TIME, NAMED).velocity
    assert np.abs(flipped[::-1] - run(p, PICTURE, TIME, NAMED).velocity).max() > 1e-2


def test_a_fresh_model_returns_zero_and_its_blocks_are_the_identity():
    fresh = dit.init(jax.random.key(0), CONFIG)
    stated = jax.eval_shape(lambda: dit.init(jax.random.key(0), CONFIG))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(
        lambda x: (x.shape, x.dtype), stated
    )
    out = jitted(CONFIG)(fresh, PICTURE, TIME, NAMED)
    np.testing.assert_array_equal(out.velocity, 0.0)
    np.testing.assert_array_equal(out.features[0], out.features[1])
    moved = jax.tree.map(lambda x: x, fresh)
    moved["blocks"]["cross"]["out"]["bias"] = jnp.ones((2, 8))
    assert np.abs(jitted(CONFIG)(moved, PICTURE, TIME, NAMED).features[0] - out.features[0]).max()


def test_cut_and_joined_by_numpy():
    tokens = np.asarray(dit.cut(jnp.asarray(PICTURE), 2))
    np.testing.assert_array_equal(tokens[4], PICTURE[2:4, 2:4].reshape(-1))  # row 1, column 1
    np.testing.assert_array_equal(dit.joined(jnp.asarray(tokens), (4, 6, 3), 2), PICTURE)


def test_adapters_on_all_linear_layers():
    p = params(CONFIG)
    run = lambda p, z: dit.forward(p, z, TIME, NAMED, config=CONFIG).velocity  # noqa: E731
    adapter = jl.init(
        jax.random.key(0), run, p, PICTURE, methods={"all-linear": jl.LoRA(rank=2, alpha=4.0)}
    )
    adapted = set(adapter.sites)
    for path in ("patch", "time/up", "modulation", "blocks/modulation/down", "blocks/modulation/up",
                 "blocks/attention/query", "blocks/cross/value", "blocks/ffn/down",
                 "last/modulation", "last/out"):  # fmt: skip
        assert any(path in str(site) for site in adapted), (path, adapted)
    random = np.random.default_rng(2)
    trainable = jax.tree.map(
        lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), adapter.trainable
    )
    adapter = adapter.replace(trainable=trainable)
    lifted = jax.jit(jl.lift(run))(p, adapter, PICTURE)
    merged = jitted(CONFIG)(jl.merge(p, adapter), PICTURE, TIME, NAMED).velocity
    np.testing.assert_allclose(lifted, merged, rtol=1e-3, atol=1e-3)
    assert np.abs(merged - jitted(CONFIG)(p, PICTURE, TIME, NAMED).velocity).max() > 0.1


@pytest.mark.parametrize("shape", [(4, 6, 1), (4, 5, 3), (3, 4, 3), (0, 4, 3), (4, 6)])
def test_pictures_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="picture: got"):
        dit.forward(params(CONFIG), jnp.zeros(shape), TIME, NAMED, config=CONFIG)


@pytest.mark.parametrize(
    ("field", "value"), [("width", 10), ("heads", 3), ("rank", 9), ("rank", -1), ("styles", 0)]
)
def test_impossible_architectures_are_refused(field, value):
    good: Any = {"styles": 1, "words": 1, "width": 8, "heads": 2, "rank": 0}
    with pytest.raises(ValueError, match=f"DiTConfig: {'width' if field == 'heads' else field}"):
        dit.DiTConfig(**(good | {field: value}))
