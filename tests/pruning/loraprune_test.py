"""LoRAPrune: the step identity, scores and schedule by numpy; what is useless goes first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jlora as jl
from jlora.pruning import loraprune, slicing
from jlora.pruning.linked_axes import linked
from tests.pruning.conftest import FFN, full_model

RNG = np.random.default_rng(2)


def loss(trainable, params, adapter, tiny):
    y = jl.lift(full_model)(params, adapter.replace(trainable=trainable), tiny.hidden, tiny.mask)
    return jnp.sum(jnp.sin(y))


@pytest.fixture(scope="module")
def gradients(tiny):
    """(trainable, params, adapter) -> gradients of the loss by trainable; compiled once."""
    return jax.jit(jax.grad(lambda t, p, a: loss(t, p, a, tiny)))


@pytest.fixture(scope="module")
def slopes(tiny, gradients):
    return gradients(tiny.adapter.trainable, tiny.params, tiny.adapter)


def by_numpy(tiny, slopes, power):
    """S of every unit, from a step of rate 1 written out."""
    out = {}
    for group in tiny.groups:
        total = np.zeros((*group.stack, group.units))
        for axis in group.axes:
            if axis.path not in tiny.adapter.trainable:
                continue
            for layer in range(2):
                t = {k: np.asarray(v[layer], "f8") for k, v in
                     tiny.adapter.trainable[axis.path].items()}  # fmt: skip
                g = {k: np.asarray(v[layer], "f8") for k, v in slopes[axis.path].items()}
                s = float(tiny.adapter.frozen[axis.path]["scale"][layer])
                part, name = axis.path.split("/")[1:3]
                w = np.asarray(tiny.params["layers"][part][name]["kernel"][layer], "f8")
                delta = s * t["a"] @ t["b"]
                step = delta - s * (t["a"] - g["a"]) @ (t["b"] - g["b"])
                each = (np.abs(step * (w + delta)) ** power).sum(0 if axis.axis == -1 else 1)
                own = np.asarray([each[u * axis.block : (u + 1) * axis.block].sum()
                                  for u in range(group.units)])  # fmt: skip
                total[layer] += own / np.linalg.norm(own)
        out[group.name] = total
    return out


def check(scores, tiny, slopes):
    for power in (1, 2):
        got = scores(tiny.params, tiny.adapter, slopes, tiny.groups, power)
        want = by_numpy(tiny, slopes, power)
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-4)


def test_scores(tiny, slopes):
    check(jax.jit(loraprune.scores, static_argnums=(3, 4)), tiny, slopes)


def test_mutation_the_product_of_both_gradients_counts(tiny, slopes, monkeypatch):
    def first_order(a, b, ga, gb, scale):
        return scale[..., None, None] * (ga @ b + a @ gb)

    monkeypatch.setattr(loraprune, "change", first_order)
    with pytest.raises(AssertionError):
        check(loraprune.scores, tiny, slopes)


def test_no_gradient_of_a_kernel_is_formed(tiny):
    """Of 8 x 6 and 6 x 8 the backward pass has none; of the parameters it would."""

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield eqn.outvars[0].aval.shape
            for sub in jaxprs_in_params(eqn.params):
                yield from sizes(sub)

    thin = jax.make_jaxpr(jax.grad(lambda t: loss(t, tiny.params, tiny.adapter, tiny)))(
        tiny.adapter.trainable
    )
    whole = jax.make_jaxpr(
        jax.grad(lambda p: jnp.sum(jnp.sin(full_model(p, tiny.hidden, tiny.mask))))
    )(tiny.params)
    seen = [{s[-2:] for s in sizes(x.jaxpr)} for x in (thin, whole)]
    kernels = {(8, 6), (6, 8)}
    assert seen[0] and not seen[0] & kernels and seen[1] & kernels


def test_the_schedule_is_cubic():
    got = [float(loraprune.ratio(t, 20, 0.5)) for t in range(21)]
    assert got[:3] == [0.0] * 3 and got[18:] == [0.5] * 3
    want = [0.5 - 0.5 * (1 - (t - 2) / 16) ** 3 for t in range(2, 19)]
    np.testing.assert_allclose(got[2:19], want, atol=1e-6)


def test_masks_grow_by_the_schedule_and_stay(tiny):
    state = loraprune.start(tiny.groups)
    assert {k: v.shape for k, v in state.kept.items()} == {"heads": (2, 4), "columns": (2, 6)}
    order = {k: np.tile(np.arange(v.shape[1], dtype="f4"), (2, 1)) for k, v in state.scores.items()}
    draw = {k: jnp.asarray(RNG.permuted(v, axis=1)) for k, v in order.items()}
    step = jax.jit(loraprune.pruned)
    state = step(state._replace(scores=draw), 0.25)
    for name, count in (("heads", 1), ("columns", 1)):
        gone = ~np.asarray(state.kept[name])
        assert (gone.sum(1) == count).all() and (np.asarray(draw[name])[gone] == 0).all()
    turned = state._replace(scores={k: -v for k, v in draw.items()})
    half = step(turned, 0.5)
    for name, count in (("heads", 2), ("columns", 3)):
        kept = np.asarray(half.kept[name])
        assert (kept.sum(1) == count).all() and not (kept & ~np.asarray(state.kept[name])).any()
    assert all((step(half, 0.1).kept[n] == half.kept[n]).all() for n in half.kept)


def test_the_running_mean(tiny, slopes):
    now = loraprune.scores(tiny.params, tiny.adapter, slopes, tiny.groups)
    state = loraprune.start(tiny.groups)
    for _ in range(2):
        state = loraprune.observe(state, tiny.params, tiny.adapter, slopes, tiny.groups)
    assert int(state.step) == 2
    for name, value in now.items():
        np.testing.assert_allclose(state.scores[name], (0.9 * 0.1 + 0.1) * value, rtol=1e-5)


def test_units_that_nothing_reads_go_first(tiny, gradients):
    """Columns 1 and 4 of layer 0 have no weight downwards; their LoRA is zero there too."""
    idle = jnp.ones((2, 6), bool).at[0, jnp.asarray([1, 4])].set(False)
    kept = {"columns": idle, "heads": jnp.ones((2, 4), bool)}
    params = slicing.masked(tiny.params, tiny.groups, kept)
    adapter = slicing.masked_adapter(tiny.adapter, tiny.groups, kept)
    slopes = gradients(adapter.trainable, params, adapter)
    state = loraprune.observe(loraprune.start(tiny.groups), params, adapter, slopes, tiny.groups)
    done = loraprune.pruned(state, 1 / 3)
    assert np.flatnonzero(~np.asarray(done.kept["columns"][0])).tolist() == [1, 4]


def test_refusals(tiny, slopes):
    args = tiny.params, tiny.adapter, slopes
    with pytest.raises(ValueError, match="power: got 3, expected 1 or 2"):
        loraprune.scores(*args, tiny.groups, 3)
    with pytest.raises(ValueError, match=r"decay: got 1, expected in \[0, 1\)"):
        loraprune.observe(loraprune.start(tiny.groups), *args, tiny.groups, decay=1)
    with pytest.raises(ValueError, match=r"final: got 1.0, expected in \[0, 1\)"):
        loraprune.ratio(0, 10, 1.0)
    with pytest.raises(ValueError, match=r"warmup, cooldown: got 0\.6 and 0\.6"):
        loraprune.ratio(0, 10, 0.5, 0.6, 0.6)
    bare = linked("biases", {"b": jnp.ones((2, 4)), "w": jnp.ones((2, 4, 4))}, 2, ["b"], ["w"])
    with pytest.raises(ValueError, match=r"biases: got sites .*, expected LoRA at one of"):
        loraprune.scores(*args, (bare,))
    path = f"{FFN}/up/kernel"
    half = {**tiny.adapter.trainable, path: {"b": tiny.adapter.trainable[path]["b"]}}
    with pytest.raises(ValueError, match=r"up/kernel: got trained \['b'\], expected a and b"):
        loraprune.scores(tiny.params, tiny.adapter.replace(trainable=half), slopes, tiny.groups)
