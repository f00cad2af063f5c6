"""The merge of FlyLoRA: one A or many, the mean of adapters, what is tuned and what is measured."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import flylora_merge as file
from jlora.methods import FlyLoRA

D, NAMES, UNUSED = 4, ("query", "key", "value", "out"), Path("unused")


def classify(params, hidden, mask, head):
    """Logits of the mean of one linear layer's states: linear in every kernel."""
    held, real = params["layers"]["attention"], mask.astype(jnp.float32)

    def layer(h, w):
        return h + sum(h @ w[s] for s in NAMES), None

    y = jax.lax.scan(layer, hidden, {s: held[s]["kernel"] for s in NAMES})[0]
    y = jnp.einsum("btd,bt->bd", y, real) / real.sum(1)[:, None]
    return 4 * jnp.einsum("bd,bcd->bc", y, head)


TUNED = jax.jit(jl.lift(classify))


@pytest.fixture(scope="module")
def found():
    """Two tasks: labels by the first coordinate, and by the second one."""
    rng = np.random.default_rng(0)
    kernel = {"kernel": jnp.asarray(0.05 * rng.normal(size=(1, D, D)), jnp.float32)}
    label = rng.integers(0, 2, 64)
    hidden = 0.3 * rng.normal(size=(64, 3, D))
    hidden[np.arange(64), :, np.repeat([0, 1], 32)] += 2.0 * label[:, None] - 1
    head = np.zeros((2, 2, D), np.float32)
    head[:, 0, 2], head[:, 1, 2] = -1, 1
    index, labels = (jnp.asarray(x.reshape(2, 32), jnp.int32) for x in (np.arange(64), label))
    hidden, mask = jnp.asarray(hidden, jnp.float32), jnp.ones((64, 3), bool)
    heads = jnp.broadcast_to(head[:, None], (2, 32, 2, D))
    test = (hidden[index], mask[index], heads), labels, (32, 30)
    base = {"layers": {"attention": dict.fromkeys(NAMES, kernel)}}
    return file.lib.Tasks(classify, base, ("a", "b"), index, labels, jnp.asarray(head), hidden,
                          mask, test)  # fmt: skip


@pytest.fixture(scope="module")
def own(found):
    """The trained adapters of each method, leaves [2, ...]."""
    patch, fly = pytest.MonkeyPatch(), FlyLoRA(4, 2, alpha=8.0)
    patch.setattr(file, "METHODS", {"FlyLoRA": fly, "LoRA": jl.LoRA(2), file.ALONE: fly})
    patch.setattr(file, "STEPS", 30)
    patch.setattr(file.lib, "tasks", lambda workdir: found)
    yield {name: file.trained.__wrapped__(name, 0.05, 1, UNUSED) for name in file.METHODS}
    patch.undo()


def logits(found, every, n):
    adapter = jax.tree.map(lambda x: x[n], every)
    inputs = found.hidden[:8], found.mask[:8], jnp.broadcast_to(found.heads[0], (8, 2, D))
    return np.asarray(TUNED(found.base, adapter, *inputs, ctx={"mask": inputs[1]}))


def test_adapters_learn_their_tasks_and_share_a_where_they_should(found, own):
    rows, path = file.Rows(*found.test), file.lib.SITES[0]
    for name, (every, loss) in own.items():
        assert file.accuracy(found, every, rows).min() > 0.9 and loss < 0.4
        a, b = np.asarray(every.frozen[path].get("a", np.zeros((2, 1)))), every.trainable[path]["b"]
        assert (a[0] == a[1]).all() == (name != file.ALONE)
        assert np.abs(np.asarray(b[0] - b[1])).max() > 0.01
    assert np.abs(np.asarray(own["FlyLoRA"][0].frozen[path]["bias"])).max() > 0


def test_a_merge_is_the_mean_of_the_adapters_where_a_is_shared(found, own):
    """Of a model that is linear in its kernels; bias is put to 0, as it chooses ranks."""
    gap = {}
    for name, (every, _) in own.items():
        if "bias" in every.frozen[file.lib.SITES[0]]:
            frozen = {p: {**d, "bias": jnp.zeros_like(d["bias"])} for p, d in every.frozen.items()}
            every = every.replace(frozen=frozen)
        want = (logits(found, every, 0) + logits(found, every, 1)) / 2
        made = file.merged(name, every, 1.0)
        gap[name] = np.abs(logits(found, made, 0) - want).max()
        np.testing.assert_array_equal(logits(found, made, 0), logits(found, made, 1))
        base = logits(found, jax.tree.map(jnp.zeros_like, every), 0)
        twice = logits(found, file.merged(name, every, 2.0), 0) - base
        np.testing.assert_allclose(twice, 2 * (logits(found, made, 0) - base), atol=1e-4)
    assert max(gap["FlyLoRA"], gap["LoRA"]) < 1e-4 and gap[file.ALONE] > 1e-2


def test_the_factor_is_chosen_on_validation_rows_and_figures_are_differences(
    found, own, monkeypatch
):
    test, few = file.Rows((), jnp.zeros(1), (1, 1)), file.Rows((), jnp.ones(1), (1, 1))
    monkeypatch.setattr(file, "trained", lambda name, rate, seed, workdir: (own[name][0], 0.0))
    monkeypatch.setattr(file, "best", lambda name, workdir: {"FlyLoRA": 1.0, "LoRA": 2.0}[name])
    monkeypatch.setattr(file, "rows", lambda split, workdir: test if split == "test" else few)
    monkeypatch.setattr(file, "merged", lambda name, every, factor: (name, factor))
    kept = {"FlyLoRA": 0.8, "LoRA": 0.7, file.ALONE: 0.5}

    def accuracy(found, what, at):
        if not isinstance(what, tuple):
            return np.asarray([0.9, 0.9])
        name, factor = what
        best = 1 - (factor - 2**0.5) ** 2 if at is few else factor / 10 + kept[name]
        return np.asarray([best, best])

    monkeypatch.setattr(file, "accuracy", accuracy)
    got = file.run(0, UNUSED)
    factor = got.more["FlyLoRA: factor"]
    assert factor == min(file.cells.factors(2, "LoRA", (0, 1, 2, 3)), key=lambda c: abs(c - 2**0.5))
    assert got.units == ("a", "b")
    for side, name in zip(got[1:4], file.METHODS, strict=True):
        assert side == pytest.approx([kept[name] + factor / 10 - 0.9] * 2)
    assert got.more["LoRA: rate"] == 2.0 and f"{file.ALONE}: rate" not in got.more


def test_a_rate_at_an_end_makes_the_grid_longer(monkeypatch):
    seen = []

    def trained(name, rate, seed, workdir):
        seen.append(rate)
        return None, abs(np.log(rate / 0.05))

    monkeypatch.setattr(file, "trained", trained)
    assert file.best.__wrapped__("LoRA", UNUSED) == pytest.approx(0.054) and len(seen) == 5
