"""`jl.merging.merge`: meaning, compilation, refusals, certificates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.merging.engine import run as running
from jlora.merging.engine.streamed import Solver

W = np.array([0.5, 0.3, 0.2], np.float32)


def test_merging_is_merging_the_weights(params, adapters):
    """The exact sum of adapters, applied, is the sum of their deltas."""
    merged = jl.merging.merge("concat", adapters, W)
    got = jl.merge(params, merged)
    for path, base in params.items():
        want = base + sum(w * jl.delta(params, a)[path] for w, a in zip(W, adapters, strict=True))
        np.testing.assert_allclose(got[path], want, atol=1e-4)


def test_out_rank_cuts_the_result(params, adapters):
    merged = jl.merging.merge("concat", adapters, W, out_rank=3)
    want = jl.merging.merge("truncated", adapters, W, options={"rank": 3})
    for path in params:
        assert merged.trainable[path]["a"].shape[-1] == 3
        got = jl.delta(params, merged)[path]
        np.testing.assert_allclose(got, jl.delta(params, want)[path], atol=1e-4)


def test_certificate_is_the_distance_to_the_sum(params, adapters):
    exact, cut = (
        jl.delta(params, jl.merging.merge(*args, W, options=options))
        for args, options in ((("concat", adapters), {}), (("truncated", adapters), {"rank": 2}))
    )
    bound = jl.merging.certificate("truncated", adapters, W, options={"rank": 2})
    for path, error in bound.items():
        true = np.linalg.norm(np.asarray(exact[path]) - cut[path], axis=(-2, -1))
        np.testing.assert_allclose(error, true, rtol=1e-4)


def test_one_compilation_for_all_weights_and_adapters(adapters):
    before = running._jitted._cache_size()
    jl.merging.merge("truncated", adapters, W, options={"rank": 1})
    jl.merging.merge("truncated", adapters[::-1], 2 * W, options={"rank": 1})
    jl.merging.merge("truncated", adapters, W, options={"rank": 1})
    # in the other order a site's padding does not change the shapes
    assert running._jitted._cache_size() - before == 1


def test_gradient_through_a_merge(params, adapters):
    """Coefficients can be learned: the gradient is that of the loss on the merged weights."""
    x = jnp.ones((2, 8))

    lora = jl.lift(lambda p, x: x @ p["lora"], unread="allow")

    def loss(w):
        merged = jl.merging.merge("concat", adapters, w)
        return jnp.sum(lora(params, merged, x) ** 2)

    deltas = [np.asarray(jl.delta(params, a)["lora"], np.float64) for a in adapters]
    y = np.ones((2, 8)) @ (params["lora"] + sum(w * d for w, d in zip(W, deltas, strict=True)))
    want = [2 * (y * (np.ones((2, 8)) @ d)).sum() for d in deltas]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.asarray(W)), want, rtol=1e-4)


def test_peak_memory_is_known_before_a_merge():
    """Eight adapters of 512 x 512 by TIES: a quarter of their dense deltas; stored, more."""
    rng = np.random.default_rng(0)
    u, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 512, 4), (8, 4, 512)))
    site = jl.Site("w", (512, 512), "io", jnp.dtype("float32"), ("dot",))
    bank = jl.merging.to_adapter({"w": LowRank(u, v)}, [site])
    bytes_of = {
        store: jl.merging.peak_memory(
            "ties", bank, options={"rank": 4, "solver": Solver(power=1, store=store)}
        )
        for store in (False, True)
    }
    dense = 512 * 512 * 4
    assert bytes_of[False]["adapters"] == u.nbytes + v.nbytes
    assert bytes_of[False]["merged"] == 2 * 512 * 4 * 4
    assert 0 < bytes_of[False]["temporary"] < 8 * dense / 4
    assert bytes_of[True]["temporary"] > dense


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda a: ("ties2", a), "merge method: got 'ties2', expected one of"),
        (lambda a: (a, "ties"), "merge method: got list, expected a name"),
        (lambda a: ("slerp", a), "slerp: got 3 adapters, expected 2"),
        (lambda a: ("concat", a, [1.0]), "weights: got shape"),
        (lambda a: ("truncated", a), "truncated: options: got none, expected 'rank', which has no"),
        (
            lambda a: ("multislerp", [a[0]] * 2, [1.0, -1.0]),
            "multislerp: loha: got nan or inf; no such merge",
        ),
    ],
    ids=["name", "no name", "number", "weights", "no rank", "no mean"],
)
def test_refusals(call, text, adapters):
    with pytest.raises(ValueError, match=text):
        jl.merging.merge(*call(adapters))


def test_no_certificate(adapters):
    with pytest.raises(ValueError, match="tsv: expected a method with a certificate"):
        jl.merging.certificate("tsv", adapters)
