"""Components: batches of mixed ranks by numpy, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.serving import components as module
from jlora.serving.components import BASE, bank, components, for_row, size

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32),
    "layers": jnp.asarray(RNG.normal(size=(2, 3, 3)), jnp.float32),
}
XS = jnp.asarray(RNG.normal(size=(3, 2, 4)), jnp.float32)


def model(p, x):
    return jax.lax.scan(lambda h, w: (h @ w, None), x @ p["w"], p["layers"])[0]


def adapter(rank, seed, pattern="w|layers", method=jl.LoRA):
    a = jl.init(jax.random.key(seed), model, PARAMS, XS[0], methods={pattern: method(rank)})
    rng = np.random.default_rng(seed)
    move = lambda t: t + jnp.asarray(rng.normal(size=t.shape), t.dtype)  # noqa: E731
    return a.replace(trainable=jax.tree.map(move, a.trainable))


SITES = tuple(jl.sites(model, PARAMS, XS[0]))
OWN = adapter(1, 1), adapter(3, 2, "layers")


def by_numpy(a, x):
    """W + scale A B, one matrix after the other, in float64."""
    weights = {k: np.float64(v) for k, v in PARAMS.items()}
    for path in a.trainable if a else ():
        t, scale = a.trainable[path], np.float64(a.frozen[path]["scale"])
        weights[path] = weights[path] + np.reshape(scale, (*scale.shape, 1, 1)) * (
            np.float64(t["a"]) @ np.float64(t["b"])
        )
    h = np.float64(x) @ weights["w"]
    return h @ weights["layers"][0] @ weights["layers"][1]


def outputs(flat, owner, rows):
    one = jax.jit(jax.vmap(lambda a, r, x: jl.lift(model)(PARAMS, for_row(a, r), x), (None, 0, 0)))
    return one(bank(flat, SITES, jnp.asarray(owner, jnp.int32)), jnp.asarray(rows, jnp.int32), XS)


def check_value():
    flat = np.concatenate([components(a, SITES) for a in OWN])
    assert flat.shape == (4, size(SITES)) == (4, 7 + 2 * 6)
    got = outputs(jnp.asarray(flat), [0, 1, 1, 1], [1, BASE, 0])
    want = [by_numpy(a, x) for a, x in zip((OWN[1], None, OWN[0]), XS, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_rows_of_mixed_ranks_by_numpy():
    check_value()


def test_mutation_every_row_gets_every_component(monkeypatch):
    monkeypatch.setattr(module, "_mine", lambda p, n: jnp.ones((1,) * n, bool))
    with pytest.raises(AssertionError):
        check_value()


def test_what_others_give_is_not_seen_even_where_it_overflows():
    flat = np.concatenate([components(a, SITES) for a in OWN])
    flat[1:, :4] = 3e38  # u of another adapter: its products with x are infinite
    got = outputs(jnp.asarray(flat), [0, 1, 1, 1], [0, BASE, 0])
    np.testing.assert_allclose(got[0], by_numpy(OWN[0], XS[0]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1], by_numpy(None, XS[1]), rtol=1e-4, atol=1e-4)


def test_a_row_of_the_base_is_the_base_to_the_bit():
    flat = jnp.asarray(np.concatenate([components(a, SITES) for a in OWN]))
    got = outputs(flat, [0, 1, 1, 1], [BASE, 0, 1])
    np.testing.assert_array_equal(got[0], jax.jit(jax.vmap(model, (None, 0)))(PARAMS, XS)[0])


def test_a_bank_for_a_row_merges():
    flat = jnp.asarray(components(OWN[0], SITES))
    own = for_row(bank(flat, SITES, jnp.zeros(1, jnp.int32)), jnp.int32(0))
    got, want = jl.merge(PARAMS, own), jl.merge(PARAMS, OWN[0])
    np.testing.assert_allclose(got["layers"], want["layers"], rtol=1e-5, atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="w: got DoRA, expected a method whose delta is a product"):
        components(adapter(1, 0, "w", jl.DoRA), SITES)
    with pytest.raises(ValueError, match="layers: got"):
        components(OWN[0], [s for s in SITES if s.path == "w"])
    bad = jax.tree.map(lambda t: t * jnp.nan, OWN[0].trainable)
    with pytest.raises(ValueError, match="layers: got numbers that are not finite"):
        components(OWN[0].replace(trainable=bad), SITES)
    with pytest.raises(ValueError, match="components: got a bank of 2 adapters"):
        components(jl.stack([OWN[0], OWN[0]]), SITES)
