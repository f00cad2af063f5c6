"""Rules of one site as optax transformations: what they are given, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.optimizers import factors

SITE = {"a": jnp.ones((4, 2)), "b": jnp.full((2, 3), 2.0)}
FROZEN = {"w": {"scale": jnp.float32(3.0)}}


def swapped():
    """Updates that show what the rule was given: the other factor times the scale."""
    return factors.per_site(
        "swapped",
        lambda a, b: a.sum(),
        lambda pair, state: (pair.a * pair.scale, pair.grad_b + 1, state + 1),
    )


def test_a_rule_sees_factors_gradients_scale_and_its_state():
    rule = swapped()
    state = rule.init({"w": SITE})
    assert float(state["w"]) == 8
    grads = {"w": {"a": SITE["a"], "b": SITE["b"].astype(jnp.bfloat16)}}
    params = {"w": {"a": SITE["a"], "b": SITE["b"].astype(jnp.bfloat16)}}
    updates, state = rule.update(grads, state, params, frozen=FROZEN)
    np.testing.assert_array_equal(updates["w"]["a"], np.full((4, 2), 3.0))
    assert updates["w"]["b"].dtype == jnp.bfloat16 and float(updates["w"]["b"][0, 0]) == 3
    assert float(state["w"]) == 9


def test_what_it_needs_is_said():
    rule = swapped()
    state = rule.init({"w": SITE})
    with pytest.raises(ValueError, match="swapped: update: got no params, expected update"):
        rule.update({"w": SITE}, state, None, frozen=FROZEN)
    with pytest.raises(ValueError, match=r"got no frozen, .*frozen=adapter.frozen"):
        rule.update({"w": SITE}, state, {"w": SITE})
    with pytest.raises(ValueError, match=r"w: got arrays \['a', 'b', 'm'\], expected trained"):
        rule.init({"w": {**SITE, "m": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"w: got arrays \['b'\], expected trained"):
        rule.init({"w": {"b": SITE["b"]}})


def test_damped_inverse_of_a_stack():
    gram = factors.gram_a(jnp.stack([SITE["a"], 0 * SITE["a"]]))
    found = factors.damped_inverse(gram, 0.5)
    want = [np.linalg.inv(np.full((2, 2), 4.0) + 0.5 * np.eye(2)), 2 * np.eye(2)]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    np.testing.assert_array_equal(factors.gram_b(SITE["b"]), np.full((2, 2), 12.0))
