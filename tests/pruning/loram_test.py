"""LoRAM: recovery by numpy, the way there and back, masks by score, the quantised form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.pruning import loram, slicing
from jlora.pruning.linked_axes import linked
from tests.pruning.conftest import FFN, full_model, small_model


@pytest.fixture(scope="module")
def small(tiny):
    """An adapter of the sliced model, as if it had been trained there."""
    return slicing.sliced_adapter(tiny.adapter, tiny.groups, tiny.kept)


def check(recover, tiny, small):
    """The delta on kept units is the small one's, elsewhere it is zero."""
    full = recover(small, tiny.groups, tiny.kept)
    assert full.sites == tiny.adapter.sites
    assert all(s.shape == t.shape for (s, _), (t, _) in zip(full.sites, tiny.adapter.sites,
                                                            strict=True))  # fmt: skip
    got = jl.delta(tiny.params, full)
    before = jl.delta(tiny.params, tiny.adapter)
    for path, delta in got.items():
        want = np.asarray(before[path])
        for group in tiny.groups:
            for axis in group.axes:
                if axis.path == path:
                    whole = np.repeat(np.asarray(tiny.kept[group.name]), axis.block, axis=-1)
                    want = want * (whole[:, None, :] if axis.axis == -1 else whole[..., None])
        np.testing.assert_allclose(delta, want, atol=1e-6)
    return full


def test_recovery(tiny, small):
    full = check(loram.recovered, tiny, small)
    again = slicing.sliced_adapter(full, tiny.groups, tiny.kept)
    jax.tree.map(np.testing.assert_array_equal, again.trainable, small.trainable)
    masked = slicing.masked(tiny.params, tiny.groups, tiny.kept)
    run = jax.jit(jl.lift(full_model))
    sliced = slicing.sliced(tiny.params, tiny.groups, tiny.kept)
    np.testing.assert_allclose(
        run(masked, full, tiny.hidden, tiny.mask),
        jax.jit(jl.lift(small_model))(sliced, small, tiny.hidden, tiny.mask),
        atol=2e-5,
    )


def test_mutation_places_of_another_layer(tiny, small):
    def shifted(adapter, groups, kept):
        return loram.recovered(adapter, groups, {k: m[::-1] for k, m in kept.items()})

    with pytest.raises(AssertionError):
        check(shifted, tiny, small)


def test_masks_by_score_and_by_chance(tiny):
    score = jnp.asarray([[0.3, 0.1, 0.2, 0.4, 0.0]])
    np.testing.assert_array_equal(loram.by_score(score, 0.4), [[1, 0, 1, 1, 0]])
    assert loram.by_score(score, 0.0).all() and loram.by_score(score, 0.99).sum() == 1
    kept = loram.drawn(jax.random.key(0), tiny.groups, 0.5)
    slicing.check_kept(tiny.groups, kept)
    assert (kept["heads"].sum(-1) == 2).all() and (kept["columns"].sum(-1) == 3).all()
    other = loram.drawn(jax.random.key(1), tiny.groups, 0.5)
    assert any((kept[n] != other[n]).any() for n in kept)


def test_magnitudes_by_numpy(tiny):
    got = loram.magnitudes(tiny.params, tiny.groups)["columns"]
    p = tiny.params["layers"]["ffn"]
    up, bias, down = (np.asarray(x, "f8") for x in (p["up"]["kernel"], p["up"]["bias"],
                                                    p["down"]["kernel"]))  # fmt: skip
    want = (up**2).sum(1) + bias**2 + (down**2).sum(2)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_unstructured_keeps_the_largest_entries(tiny):
    path = f"{FFN}/up/kernel"
    got = np.asarray(loram.zeroed(tiny.params, [path], 0.5)["layers"]["ffn"]["up"]["kernel"])
    for layer, w in enumerate(np.asarray(tiny.params["layers"]["ffn"]["up"]["kernel"])):
        want = np.where(np.abs(w) > np.median(np.abs(w)), w, 0)
        np.testing.assert_array_equal(got[layer], want)


def test_the_quantised_form_recovers_the_same_way():
    """Blocks of the sliced kernels are quantised; the adapter does not see that."""
    rng = np.random.default_rng(5)
    w = {"up": {"kernel": rng.normal(size=(4, 8))}, "down": {"kernel": rng.normal(size=(8, 4))}}
    params = jax.tree.map(lambda t: jnp.asarray(t, jnp.float32), w)
    group = linked("columns", params, 8, ["up/kernel"], ["down/kernel"])
    kept = {"columns": jnp.arange(8) % 2 == 0}
    small = slicing.sliced(params, (group,), kept)
    packed = jax.tree.map(lambda t: jl.quantize(t, block=4), small)

    def model(p, x):
        return jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]

    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    adapter = jl.init(jax.random.key(0), model, packed, x, methods={"kernel": jl.LoRA(2, 2.0)})
    draw = lambda t: jnp.asarray(rng.normal(size=t.shape), t.dtype)  # noqa: E731
    adapter = adapter.replace(trainable=jax.tree.map(draw, adapter.trainable))
    on_small = jl.lift(model)(packed, adapter, x)
    dense = jax.tree.map(lambda t: t.dequantize(), packed, is_leaf=lambda t: hasattr(t, "codes"))
    np.testing.assert_allclose(on_small, jl.lift(model)(dense, adapter, x), rtol=1e-4, atol=1e-5)
    full = loram.recovered(adapter, (group,), kept)
    got = jl.delta(params, full)
    want = np.asarray(jl.delta(dense, adapter)["up/kernel"])
    np.testing.assert_allclose(got["up/kernel"][:, ::2], want, atol=1e-5)
    assert not np.asarray(got["up/kernel"][:, 1::2]).any()


def test_refusals(tiny, small):
    with pytest.raises(ValueError, match=r"ratio: got 1.0, expected in \[0, 1\)"):
        loram.drawn(jax.random.key(0), tiny.groups, 1.0)
    with pytest.raises(ValueError, match="nothing: got none, expected one of"):
        loram.zeroed(tiny.params, ["nothing"])
    with pytest.raises(ValueError, match=r"got a factor with 8 entries, expected the 4 that are"):
        loram.recovered(tiny.adapter, tiny.groups, tiny.kept)
