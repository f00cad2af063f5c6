"""One adapter for a mixture: its batches, gradient and state, baselines, the shuffled control."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import routed_text as lib
from jlora.methods import FlyLoRA, LoRAMixer, MeteoRA, SMoRA, XLoRA

D, NAMES = 4, ("query", "key", "value", "out")
UNUSED = Path("unused")


def tokens(params, hidden):
    held = params["layers"]["attention"]

    def layer(h, w):
        return h + sum(h @ w[s] for s in NAMES), None

    return jax.lax.scan(layer, hidden, {s: held[s]["kernel"] for s in NAMES})[0]


def classify(params, hidden, mask, head):
    """Logits of the mean of a two-layer linear model's states."""
    real = mask.astype(jnp.float32)
    y = jnp.einsum("btd,bt->bd", tokens(params, hidden), real) / real.sum(1)[:, None]
    return 4 * jnp.einsum("bd,bcd->bc", y, head)


def states(params, hidden, mask, head):
    return tokens(params, hidden)


@pytest.fixture(scope="module")
def found():
    """Two tasks whose texts lie in different places and ask for opposite answers."""
    rng = np.random.default_rng(0)
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    base = {"layers": {"attention": {s: {"kernel": f32(0.05 * rng.normal(size=(2, D, D)))}
                                     for s in NAMES}}}  # fmt: skip
    label, place = rng.integers(0, 2, 64), np.repeat([-1.0, 1.0], 32)
    sign = place * (2 * label - 1)
    hidden = 0.3 * rng.normal(size=(64, 3, D))
    hidden[..., 0] += sign[:, None]
    hidden[..., 1] += 2 * place[:, None]
    head = np.zeros((2, 2, D))
    head[:, 0, 2], head[:, 1, 2] = -1, 1
    index = jnp.arange(64, dtype=jnp.int32).reshape(2, 32)
    labels = jnp.asarray(label.reshape(2, 32), jnp.int32)
    mask = jnp.ones((64, 3), bool).at[:, 2].set(jnp.arange(64) % 2 == 0)
    return lib.Mix(classify, states, base, ("a", "b"), index, labels, f32(head), f32(hidden), mask,
                   (index, labels), (index, labels))  # fmt: skip


def recipe(method, **how):
    return lib.Recipe("toy", method, 0.05, **{"steps": 40, **how})


ZOO = [jl.LoRA(rank=2, alpha=2.0)] * 2


@pytest.fixture(scope="module")
def loras(found):
    """The adapter of each task alone."""

    def one(t):
        index, label, heads = (x[t][None] for x in (found.index, found.label, found.heads))
        twice = (jnp.concatenate([x, x]) for x in (index, label, heads))  # shapes of both tasks
        return found._replace(**dict(zip(("index", "label", "heads"), twice, strict=True)))

    plain = recipe(ZOO[0])
    start = lib.fresh(found, plain, 0, UNUSED)
    return [lib.train(one(t), plain, start, 0.05, 0)[0] for t in range(2)]


def test_the_first_loss_is_that_of_a_batch_of_all_tasks(found):
    """The mean over the rows that the key draws, in numpy; then it falls."""
    plain = recipe(ZOO[0])
    _, losses = lib.train(found, plain, lib.fresh(found, plain, 0, UNUSED), 0.05, 7)
    of_task, of_row = jax.random.split(jax.random.fold_in(jax.random.key(7), 0))
    task = np.asarray(jax.random.randint(of_task, (lib.BATCH,), 0, 2))
    row = np.asarray(jax.random.randint(of_row, (lib.BATCH,), 0, 32))
    index, label = (np.asarray(t)[task, row] for t in (found.index, found.label))
    h, mask = (np.asarray(t, "f8")[index] for t in (found.hidden, found.mask))
    held = found.base["layers"]["attention"]
    w = np.eye(D) + sum(np.asarray(held[s]["kernel"], "f8") for s in NAMES)
    y = np.einsum("btd,bt->bd", h, mask) / mask.sum(1)[:, None] @ w[0] @ w[1]
    z = 4 * np.einsum("bd,bcd->bc", y, np.asarray(found.heads, "f8")[task])
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    picked = p[np.arange(lib.BATCH), label]
    np.testing.assert_allclose(losses[0], -np.log(picked).mean(), rtol=1e-5)
    assert set(task) == {0, 1} and losses[-5:].mean() < losses[:5].mean()


def test_routers_learn_what_no_single_adapter_can(found, loras, monkeypatch):
    """Gates that are taught tasks, over adapters of the tasks; shuffled, they choose the wrong."""
    monkeypatch.setattr(lib, "experts", lambda *a: loras)
    gated = recipe(MeteoRA(experts=2, top_k=1, rank=2), labels=1.0, zoo=True)
    made, _ = lib.train(found, gated, lib.fresh(found, gated, 0, UNUSED), 0.05, 0)
    for n, arrays in enumerate(made.frozen[lib.SITES[0]]["b"][0]):
        np.testing.assert_array_equal(arrays, loras[n].trainable[lib.SITES[0]]["b"][0])
    ours = lib.judge(found, gated, made, found.test)
    single = [lib.judge(found, recipe(ZOO[0]), a, found.test).mean() for a in loras]
    assert ours.min() > 0.9 > 0.8 > max(single)
    assert lib.judge(found, gated, lib.shuffled(made), found.test).mean() < 0.3


def test_states_advance_in_training_and_a_shuffled_router_is_the_next_ones(found):
    how = recipe(SMoRA(rank=4, top_k=1, rate=0.01), steps=3)
    made, _ = lib.train(found, how, lib.fresh(found, how, 0, UNUSED), 0.05, 0)
    path = lib.SITES[0]
    bias = np.asarray(made.frozen[path]["bias"])
    assert bias.shape == (2, 4) and 0 < np.abs(bias).max() <= 0.0301
    turned = lib.shuffled(made)
    want = np.roll(made.trainable[path]["router"], 1, -1)
    np.testing.assert_array_equal(turned.trainable[path]["router"], want)
    np.testing.assert_array_equal(turned.frozen[path]["bias"], np.roll(bias, 1, -1))
    start = lib.fresh(found, recipe(FlyLoRA(rank=4, top_k=1)), 0, UNUSED)
    move = lambda t: t + jnp.arange(4, dtype=t.dtype)[None, :, None]  # noqa: E731
    start = start.replace(trainable=jax.tree.map(move, start.trainable))
    want = np.roll(start.trainable[path]["b"], 1, -2)  # ranks that choose themselves
    np.testing.assert_array_equal(lib.shuffled(start).trainable[path]["b"], want)


def test_the_first_pass_is_the_base_and_gives_the_second_its_states(found, loras, monkeypatch):
    monkeypatch.setattr(lib, "experts", lambda *a: loras)
    mixed = recipe(XLoRA(experts=2, hidden=D, rank=2), zoo=True, states=True)
    made = lib.fresh(found, mixed, 0, UNUSED)
    got = lib.judge(found, mixed, made, found.test)[1]
    inputs = found.hidden[32:], found.mask[32:], found.heads[jnp.ones(32, jnp.int32)]
    ctx = {"hidden": tokens(found.base, found.hidden[32:])}
    logits = jax.jit(jl.lift(classify))(found.base, made, *inputs, ctx=ctx)
    assert got == np.mean(logits.argmax(-1) == found.label[1])


@pytest.mark.parametrize(
    ("top", "tried", "edge"), [(1.5, 3, False), (9.0, 5, False), (1e4, 5, True)]
)
def test_the_grid_of_rates_grows_at_its_ends(found, monkeypatch, top, tried, edge):
    seen = []

    def train(found, recipe, adapter, rate, seed):
        seen.append(rate)
        return rate, np.zeros(1)

    def judge(found, recipe, rate, rows):
        assert rows is found.validation
        return np.exp(-(np.log(np.asarray([rate]) / top) ** 2) / 100)

    monkeypatch.setattr(lib, "train", train)
    monkeypatch.setattr(lib, "judge", judge)
    monkeypatch.setattr(lib, "mix", lambda workdir: found)
    best = lib.tune(dataclasses.replace(recipe(ZOO[0]), rate=1.0), UNUSED)
    assert (len(seen), best.edge) == (tried, edge) and best.rate in seen


def test_static_baselines_are_chosen_on_validation_rows(found, monkeypatch):
    """Test rows would have chosen otherwise; the factor of a merge is chosen with it."""
    validation = {"one": 0.6, "two": 0.7, "ties": 0.8, "tsv": 0.75, "task_arithmetic": 0.5}

    def accuracies(workdir, adapter, factor, names, split):
        value = validation[adapter] - 0.1 * abs(factor - 2.0)
        value = value if split == "validation" else 1 - value
        return {"a": value, "b": value + 0.01}

    monkeypatch.setattr(lib, "mix", lambda workdir: found)
    monkeypatch.setattr(lib, "experts", lambda *a: ["one", "two"])
    monkeypatch.setattr(lib.text_merges, "merged", lambda side, adapters, seed: side.method)
    monkeypatch.setattr(lib.text_merges, "accuracies", accuracies)
    monkeypatch.setattr(lib.cells, "factors", lambda size, method, powers: [1.0, 2.0, 4.0])
    name, values = lib.static.__wrapped__("single", 0, UNUSED)
    assert name == "b" and values == pytest.approx((0.4, 0.41))
    name, values = lib.static.__wrapped__("merge", 0, UNUSED)
    assert name == "ties x 2" and values == pytest.approx((0.2, 0.21))


def test_entropy_that_is_minimised_makes_a_router_decide(found, loras, monkeypatch):
    monkeypatch.setattr(lib, "experts", lambda *a: loras)
    method = LoRAMixer(experts=2, rank=2, top_k=1, train_experts=False)
    how = recipe(method, entropy=1.0, zoo=True, regime="sparse")
    start = lib.fresh(found, how, 0, UNUSED)
    made, _ = lib.train(found, how, start, 0.05, 0)
    size = lambda a: float(jnp.abs(a.trainable[lib.SITES[0]]["router"]).max())  # noqa: E731
    assert size(made) > 10 * size(start)  # a router that decides has large logits


def test_figures_say_what_was_trained(found, monkeypatch):
    ours, other = recipe(SMoRA(rank=4, top_k=1)), lib.lora(2)
    result = lib.Result((0.8, 0.6), (0.5, 0.4), 12, 0.1, True)
    made = {ours: result, other: result._replace(accuracy=(0.7, 0.6), size=9)}
    monkeypatch.setattr(lib, "run", lambda r, seed, w: made[r])
    monkeypatch.setattr(lib, "mix", lambda w: found)
    monkeypatch.setattr(lib, "static", lambda kind, seed, w: ("ties x 2", (0.3, 0.2)))
    got = lib.figures(ours, other, (), 0, UNUSED)
    assert got[:4] == (("a", "b"), (0.8, 0.6), (0.7, 0.6), (0.5, 0.4))
    assert got.more["LoRA of rank 2: trained numbers"] == 9
    got = lib.figures(ours, "merge", (other,), 0, UNUSED)
    assert got.baseline == (0.3, 0.2) and got.more["merge: ties x 2"] == 0.25
    assert got.more["LoRA of rank 2: accuracy"] == pytest.approx(0.65)


def test_the_statement_of_a_claim():
    made = lib.claim("x", ("MeteoRA",), recipe(ZOO[0]), "merge", "nobody", margin=0.03)
    assert made.statement.endswith("toy > the best static merge + 3 points")
    made = lib.claim("x", ("SMoRA",), recipe(ZOO[0]), lib.lora(4), "nobody", margin=-0.01)
    assert made.statement.endswith("toy > LoRA of rank 4 - 1 points") and made.run.args
