"""Few shots, class vectors and training of the claims on base C, on a linear model of pictures."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from experiments.claims import block_lora, codyra, pvp
from experiments.claims import clip_training as lib

K, D = 4, 3
PARTS = {"attention": ("query", "key", "value", "out"), "ffn": ("up", "down")}


def linear(params, x, head):
    """The mean colour times the sum of all kernels, against the class vectors."""
    layers = params["vit"]["layers"]
    total = sum(layers[part][n]["kernel"][0] for part, names in PARTS.items() for n in names)
    return (x.mean((1, 2)) @ total) @ head.vectors.T + head.offset[None]


@pytest.fixture(scope="module", autouse=True)
def params():
    """The weights of the linear model, which stands for base C."""
    rng = np.random.default_rng(0)
    kernel = lambda: {"kernel": jnp.asarray(rng.normal(size=(1, D, D)), jnp.float32)}  # noqa: E731
    found = {"vit": {"layers": {p: {n: kernel() for n in ns} for p, ns in PARTS.items()}}}
    with pytest.MonkeyPatch.context() as patch:
        c = types.SimpleNamespace(config=None, params=found)
        patch.setattr(lib, "base", lambda: c)
        patch.setattr(lib, "classifier", lambda config: linear)
        patch.setattr(lib, "task", task)
        yield found


def rows(count, seed):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
    label = np.arange(count, dtype=np.int32) % 3
    tint = np.eye(3, dtype=np.int32)[label] * 90
    return lib.Rows((pixels // 2 + tint[:, None, None]).astype(np.uint8), label)


def task(style, size=K):
    """Three classes, of more red, green or blue; the fourth does not exist."""
    vectors = np.random.default_rng(len(style)).normal(size=(K, D)).astype(np.float32)
    offset = np.asarray([0, 0, 0, lib.NEVER], np.float32)
    head = lib.Head(jnp.asarray(vectors), jnp.asarray(offset))
    return lib.Task(style, head, rows(60, 1), rows(21, 2))


def test_few_rows_of_each_class_and_the_others():
    found = rows(30, 0)
    one, rest = lib.few(found, 2, 0)
    assert np.bincount(one.label).tolist() == [2, 2, 2] and len(rest.label) == 24
    both = {x.tobytes() for x in (*one.pixels, *rest.pixels)}
    assert len(both) == 30, "no row twice"
    assert (lib.few(found, 2, 1)[0].pixels != one.pixels).any()
    lost = lib.shuffled(found, 0)
    assert sorted(lost.label) == sorted(found.label) and (lost.label != found.label).any()
    pixels, label = lib.drawn(one, 3, 0)
    assert pixels.shape == (3, lib.BATCH, 32, 32, 3) and label.shape == (3, lib.BATCH)
    of = {x.tobytes(): y for x, y in zip(one.pixels, one.label, strict=True)}
    assert all(of[x.tobytes()] == y for x, y in zip(pixels[0], label[0], strict=True))


def test_accuracy_is_of_real_rows_and_never_a_class_that_is_missing(params):
    t = task("x")
    x = (t.test.pixels.astype(np.float64) - 127.5) / 127.5
    layers = params["vit"]["layers"]
    total = sum(np.asarray(layers[p][n]["kernel"][0], "f8") for p, ns in PARTS.items() for n in ns)
    z = x.mean((1, 2)) @ total @ np.asarray(t.head.vectors, "f8").T
    want = (z[:, :3].argmax(1) == t.test.label).mean()
    assert lib.accuracy(linear, params, t.head, t.test) == pytest.approx(want)
    own = lib.Rows(t.test.pixels, np.full(len(t.test.label), 3, np.int32))
    assert lib.accuracy(linear, params, t.head, own) == 0.0
    free = t.head._replace(offset=-t.head.offset)
    assert lib.accuracy(linear, params, free, own) == 1.0, "mutation: the class exists"


def test_a_step_is_down_the_gradient_of_the_mean_loss(params):
    t = task("x")
    start = lib.fresh(linear, params, t.head, jl.LoRA(rank=2, alpha=2.0), 0)
    assert len(start.sites) == len(lib.SITES)
    after = lib.fit(linear, params, start, t.head, t.train, solver=block_lora.descent, rate=0.5,
                    steps=1, seed=0)  # fmt: skip
    pixels, label = lib.drawn(t.train, 1, 0)
    x = ((pixels[0].astype(np.float64) - 127.5) / 127.5).mean((1, 2))
    layers = params["vit"]["layers"]
    total = sum(np.asarray(layers[p][n]["kernel"][0], "f8") for p, ns in PARTS.items() for n in ns)
    z = x @ total @ np.asarray(t.head.vectors, "f8").T + np.asarray(t.head.offset, "f8")
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    out = (p - np.eye(K)[label[0]]) @ np.asarray(t.head.vectors, "f8") / lib.BATCH
    for path, own in start.trainable.items():
        a = np.asarray(own["a"][0], "f8")
        got = np.asarray(after.trainable[path]["b"][0])
        np.testing.assert_allclose(got, -0.5 * (x @ a).T @ out, rtol=1e-3, atol=1e-5)


def test_blocks_move_as_one_block_at_a_rate_as_many_times_as_large(monkeypatch):
    assert block_lora.apart(0) < 1e-6
    monkeypatch.setattr(block_lora, "faster", plain)
    assert block_lora.apart(0) > 0.1, "mutation: at the same rate"


def plain(rate):
    return optax.sgd(rate)


def test_a_stream_has_weights_after_each_task_and_thresholds_drop_ranks(params, monkeypatch):
    monkeypatch.setattr(codyra, "STEPS", 6)
    monkeypatch.setattr(codyra, "RAMP", codyra.codyra.Ramp(0.5, 2, 0))
    monkeypatch.setattr(codyra, "METHOD", jl.LoRA(rank=2, alpha=2.0))
    found = codyra.stream(True, 1e-2, 0)
    assert len(found.weights) == len(found.left) == len(codyra.STREAM)
    assert all(0 <= x < 1 for x in found.left)
    chex_same = [jax.tree.structure(w) == jax.tree.structure(params) for w in found.weights]
    assert all(chex_same)
    assert codyra.scores(found.weights[-1]).shape == (len(codyra.STREAM),)


def test_a_start_from_the_first_stage_is_its_function(params, monkeypatch):
    t, seen = task("x"), []
    monkeypatch.setattr(pvp, "halves", lambda style: (t.head, t.train, rows(60, 3), 3))
    monkeypatch.setattr(pvp, "FIRST_STEPS", 6)
    monkeypatch.setattr(pvp, "STEPS", 6)
    c = types.SimpleNamespace(config=types.SimpleNamespace(joint=D), params=params)
    monkeypatch.setattr(lib, "base", lambda: c)
    real = pvp._few_shot

    def few_shot(apply, sites, weights, trainable, *more):
        seen.append(trainable)
        return real(apply, sites, weights, trainable, *more)

    monkeypatch.setattr(pvp, "_few_shot", few_shot)
    source = pvp.first_stage.__wrapped__("x", 0, False)
    warm = pvp.second_stage("x", 2, source, 1e-2, 0)
    cold = pvp.second_stage("x", 2, None, 1e-2, 0)
    assert 0 <= cold <= 1 and 0 <= warm <= 1
    jax.tree.map(np.testing.assert_array_equal, seen[0], source.trainable)
    assert all(not np.asarray(own["b"]).any() for own in seen[1].values())
