"""The claim of RecLoRA: who is judged with which rows, what a user's vector sees, the AUC."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import reclora as lib

COUNT = 30  # passages of a user


def score(params, hidden, mask, short):
    """The first number of a passage, and what an adapter adds to it."""
    return hidden[:, 0, 0] + 1e-6 * (hidden[:, 0] @ params["w"] @ short.T)[:, 0]


@pytest.fixture(scope="module")
def found():
    """Six users of two eras; each has a word of its own, and one that only row 7 of it has."""
    draw = np.random.default_rng(0)
    words = [f"all {'abcdef'[u] * 3} {'rare' if k == 7 else 'common'}"
             for u in range(6) for k in range(COUNT)]  # fmt: skip
    hidden = jnp.asarray(draw.normal(size=(6 * COUNT, 2, 4)), jnp.float32)
    own = tuple(np.split(np.arange(6 * COUNT), 6))
    embedding = draw.normal(size=(6 * COUNT, 4)).astype("f4")
    mask, era = jnp.ones((6 * COUNT, 2), bool), np.asarray([0, 0, 0, 1, 1, 1])
    users = tuple("abcdef")
    return lib.Texts(
        score, {"w": jnp.eye(4)}, hidden, mask, embedding, tuple(words), users, own, era
    )


def test_rows_of_a_user_are_its_own_and_in_one_part_only(found):
    at = lib.split(found, 0)
    for user in range(6):
        parts = [set(np.asarray(t[user]).tolist()) for t in (at.few, at.validation, at.test)]
        assert [len(p) for p in parts] == [lib.FEW, lib.VALIDATION, lib.TEST]
        assert len(set().union(*parts)) == sum(map(len, parts)), "in one part only"
        assert set().union(*parts) <= set(found.own[user].tolist())
        rivals = set(np.asarray(at.rivals[user]).tolist())
        assert rivals == {k for k in range(6) if k // 3 == user // 3} - {user}
    assert (np.asarray(lib.split(found, 1).test) != np.asarray(at.test)).any()


def test_vectors_of_users_do_not_see_what_is_judged(found):
    at = lib.split(found, 0)
    judged = {*np.asarray(at.test).ravel().tolist(), *np.asarray(at.validation).ravel().tolist()}
    other = ["x y z" if k in judged else w for k, w in enumerate(found.words)]
    again = lib.split(found._replace(words=tuple(other)), 0)
    np.testing.assert_array_equal(again.long, at.long)
    seen = set(found.own[0].tolist()) - judged
    other = ["ddd" if k in seen else w for k, w in enumerate(found.words)]
    again = lib.split(found._replace(words=tuple(other)), 0)
    assert np.abs(np.asarray(again.long - at.long)).max() > 0.1


def test_auc_is_the_share_of_pairs_in_order(found):
    at = lib.split(found, 0)
    one = start(found, at, lib.Recipe("x", lambda _: jl.LoRA(1)))
    got = lib.auc(found, at, one, at.test, at.long)
    mark, test = np.asarray(found.hidden[:, 0, 0]), np.asarray(at.test)
    for user in (0, 4):
        rival = np.resize(np.unique(at.rivals[user]), 20)
        bad = mark[test[rival, np.arange(20) % 10]]
        pairs = mark[test[user]][:, None] > bad
        assert got[user] == pytest.approx(pairs.mean(), abs=1e-6)
    turned = found._replace(hidden=-found.hidden)
    np.testing.assert_allclose(lib.auc(turned, at, one, at.test, at.long), 1 - got)


def start(found, at, recipe):
    """A fresh adapter, at the one site that the model of these tests has."""
    methods = {"w": recipe.method(6)}
    shapes = found.hidden[:1], found.mask[:1], at.short[:1]
    adapter = jl.init(jax.random.key(0), score, found.upper, *shapes, methods=methods)
    return lib.Trained(adapter, jnp.zeros_like(at.short))


def test_an_own_lora_is_a_lora_of_its_columns(found):
    at, recipe = lib.split(found, 0), lib.OWN
    adapter = start(found, at, recipe).adapter
    draw = np.random.default_rng(1)
    p = {n: jnp.asarray(draw.normal(size=t.shape), jnp.float32)
         for n, t in adapter.trainable["w"].items()}  # fmt: skip
    x, w = jnp.asarray(draw.normal(size=(3, 2, 4)), jnp.float32), jnp.eye(4)
    method = recipe.method(6)
    p["scale"] = jnp.float32(1.0)
    got = method.apply(x, w, p, {"number": jnp.asarray([5, 0, 2], jnp.int32)})
    for row, user in enumerate((5, 0, 2)):
        mine = slice(4 * user, 4 * user + 4)
        want = x[row] + (x[row] @ p["a"][:, mine]) @ p["b"][mine]
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-5)
    assert float(adapter.frozen["w"]["scale"]) == 1.0, "as a LoRA of rank 4 and alpha 4"


def test_training_changes_the_numbers_of_the_users_that_are_seen_and_no_vector_unasked(
    found, monkeypatch
):
    monkeypatch.setattr(lib, "SITES", ("w",))
    at, plan = lib.split(found, 0), lib.Plan(steps=1, batch=2)
    for recipe in (lib.OWN, lib.TOKEN):
        first = lib.fresh(found, at, recipe, 3)
        one = lib.trained(found, at, recipe, plan, 1e-2, 3)
        moved = np.asarray(one.adapter.trainable["w"]["b"] != first.adapter.trainable["w"]["b"])
        shifted = np.asarray(one.shift != 0).any(axis=1)
        if recipe is lib.OWN:
            users = moved.reshape(6, -1).any(axis=1)
            assert 1 <= users.sum() <= 2 and not shifted.any()
        else:
            assert moved.any() and 1 <= shifted.sum() <= 2


def test_a_user_without_a_rival_is_refused(found):
    with pytest.raises(ValueError, match="alone in its era"):
        lib.split(found._replace(era=np.asarray([0, 1, 1, 2, 2, 2])), 0)
