"""TinyLoRA: a mix of random matrices between the weight's own directions; who shares a vector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.shared_basis.tinylora import TinyLoRA, group_of, groups_of


def principal(w, rank):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]


def check_value(bench):
    adapter = bench.noisy(TinyLoRA(rank=3, size=4))
    p, v = bench.numbers(adapter), np.asarray(adapter.trainable["*0"]["v"], np.float64)
    assert v.shape == (1, 4)
    mixed = sum(v[0, i] * p["p"][i] for i in range(4))
    bench.agree(adapter, bench.w + p["a"] @ mixed @ p["b"], 5e-5)


def test_value(bench):
    check_value(bench)


def test_the_factors_are_the_principal_part(bench):
    p = bench.numbers(bench.fresh(TinyLoRA(rank=3)))
    np.testing.assert_allclose(p["a"] @ p["b"], principal(bench.w, 3), atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(p["a"], axis=0), np.linalg.norm(p["b"], axis=1), rtol=1e-5
    )
    assert 0.4 < np.std(p["p"]) < 0.75  # 3 ** -0.5 of 64 * 9 numbers


def test_limit_a_mix_of_the_identity_adds_the_principal_part(bench):
    adapter = bench.fresh(TinyLoRA(rank=2, size=1))
    frozen = {"w": {**adapter.frozen["w"], "p": jnp.eye(2)[None]}}
    trainable = {**adapter.trainable, "*0": {"v": jnp.ones((1, 1))}}
    adapter = adapter.replace(frozen=frozen, trainable=trainable)
    bench.agree(adapter, bench.w + principal(bench.w, 2))


def test_a_rank_above_the_weights_is_all_of_its_directions(bench):
    assert bench.fresh(TinyLoRA(rank=20, size=2)).frozen["w"]["a"].shape == (12, 8)


@pytest.mark.parametrize(
    ("tying", "want"), [(0.0, [0, 1, 2, 3, 4]), (0.6, [0, 0, 1, 1, 1]), (1.0, [0] * 5)]
)
def test_who_shares_a_vector(tying, want):
    groups = groups_of(5, tying)
    assert groups == max(want) + 1
    assert [group_of(k, 5, groups) for k in range(5)] == want


def test_matrices_of_all_sites_are_counted():
    """Two stacked sites of two layers each, with two vectors: one of each site."""
    params = {
        name: jnp.asarray(np.random.default_rng(k).normal(size=(2, 6, 6)), jnp.float32)
        for k, name in enumerate(("down", "up"))
    }

    def fn(p, x):
        return x @ p["down"][0] @ p["up"][0] @ p["down"][1] @ p["up"][1]

    methods = {"down|up": TinyLoRA(rank=1, size=3, tying=0.5)}
    adapter = jl.init(jax.random.key(0), fn, params, jnp.ones((1, 6)), methods=methods)
    assert adapter.trainable["*0"]["v"].shape == (2, 3)
    got = {name: adapter.frozen[name]["group"].tolist() for name in params}
    assert got == {"down": [0, 0], "up": [1, 1]}
    drawn = [np.asarray(adapter.frozen[name]["p"]) for name in params]
    assert len({t.tobytes() for stack in drawn for t in stack}) == 4


def test_refusals():
    with pytest.raises(ValueError, match=r"TinyLoRA\.size: got 0, expected an integer of at least"):
        TinyLoRA(size=0)
    with pytest.raises(ValueError, match=r"TinyLoRA\.tying: got 1\.5, expected 0 <= it <= 1"):
        TinyLoRA(tying=1.5)


def test_mutation_the_mix_transposed_is_seen(bench, monkeypatch):
    good = TinyLoRA.factors
    monkeypatch.setattr(TinyLoRA, "factors", lambda self, p: good(self, {**p, "p": p["p"].mT}))
    with pytest.raises(AssertionError):
        check_value(bench)
