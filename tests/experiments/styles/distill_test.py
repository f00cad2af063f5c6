"""Distillation of a tiny base: what is trained, what is drawn, and what the control keeps."""

import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.pictures.data import scaled
from experiments.styles import distill, lines
from experiments.styles.pictures import shapes, tiny_base
from jlora.merging.exact.lcm_arithmetic import lcm_arithmetic
from jlora.models import dit

RECIPE = distill.Recipe(distill.SITES, 2, 2.0, 4, 3, 1e-3, 2.0)
STYLED = distill.Recipe(distill.STYLE_SITES, 1, 1.0, 2, 3, 1e-3)
WORDS = np.asarray([[2, 3], [4, 0], [5, 0]], np.int32)


def rows(step):
    pixels = np.stack([p.pixels for p in shapes("google")[3 * step : 3 * step + 3]])
    return scaled(pixels), dit.Condition(jnp.ones(3, jnp.int32), jnp.asarray(WORDS))


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def tau(base):
    return distill.train(base, RECIPE, rows, 0)


def test_every_linear_layer_is_trained_and_a_run_repeats(base, tau):
    adapter, losses = tau
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert {"patch/kernel", "time/up/kernel", "last/out/kernel"} <= adapter.trainable.keys()
    assert len(adapter.trainable) == 14
    moved = jl.delta(base.params, adapter)
    assert all(float(jnp.abs(d).max()) > 0 for d in moved.values())
    np.testing.assert_array_equal(distill.train(base, RECIPE, rows, 0)[1], losses)


def test_the_control_has_the_same_singular_values_and_other_directions(base, tau):
    right, wrong = (jl.delta(base.params, x) for x in (tau[0], distill.turned(tau[0], 0)))
    for path, value in right.items():
        one, other = (np.linalg.svd(np.asarray(x, np.float64))[1] for x in (value, wrong[path]))
        np.testing.assert_allclose(one, other, atol=1e-7)
        assert float(jnp.abs(value - wrong[path]).max()) > 0.1 * float(jnp.abs(value).max())


def test_the_sum_of_style_and_tau_is_drawn(base, tau):
    style = distill.train(base, STYLED, rows, 1)[0]
    both = jl.merge(base.params, lcm_arithmetic(style, tau[0]))
    path = "blocks/ffn/up/kernel"
    parts = [jl.delta(base.params, x)[path] for x in (style, tau[0])]
    expected = base.params["blocks"]["ffn"]["up"]["kernel"] + 0.8 * parts[0] + parts[1]
    np.testing.assert_allclose(both["blocks"]["ffn"]["up"]["kernel"], expected, atol=1e-6)
    styles = np.ones(3, np.int32)
    pictures = distill.sample(both, base.config, styles, WORDS, 2, 0)
    assert pictures.shape == (3, 32, 32, 3) and pictures.dtype == np.uint8
    alone = distill.sample(base.params, base.config, styles, WORDS, 2, 0)
    assert (alone != pictures).any()


def test_lines_are_means_over_styles():
    more = {f"{style}: {kind}, {n} steps: FID": base + n
            for style, base in (("a", 1.0), ("b", 3.0), ("c hue 1", 10.0))
            for kind in ("system", "baseline") for n in (1, 4)}  # fmt: skip
    more |= {"c hue 1: system, 4 steps: style score": 0.5, "a: control, 4 steps: FID": 99.0}
    got = lines.lines(more, "FID")
    assert got["base, Euler"] == {1: 3.0, 4: 6.0}
    assert got["base + 0.8 style + tau, jumps"] == {1: 11.0, 4: 14.0}
    assert lines.lines(more, "style score") == {"base + 0.8 style + tau, jumps": {4: 0.5}}
    assert lines.plot({"figures": [{"more": more}]}).startswith("<svg")
    with pytest.raises(ValueError, match="expected keys as"):
        lines.lines({"x": 1.0}, "FID")


def test_a_loss_that_is_not_finite_is_an_error(base):
    with pytest.raises(FloatingPointError, match="at step 0"):
        distill.train(base, RECIPE, lambda n: (rows(n)[0] * np.float32(np.nan), rows(n)[1]), 0)
