"""The abstract walk: kinds and FLOPs against hand counts, patterns, errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl


def leaf(*shape):
    return jnp.ones(shape, jnp.float32)


PARAMS = {
    "table": leaf(11, 6),
    "layers": {
        "query": {"kernel": leaf(3, 6, 2, 3), "bias": leaf(3, 2, 3)},
        "out": leaf(3, 2, 3, 6),
    },
    "image": leaf(2, 2, 1, 4),
    "scale": leaf(6),
    "unused": leaf(5),
    "count": jnp.asarray(3),
}


def model(p, ids, *, half=False):
    def step(h, layer):
        q = (
            jnp.einsum("btd,dnh->btnh", h, layer["query"]["kernel"])
            + layer["query"]["bias"][None, None]
        )
        return h + jnp.einsum("btnh,nhd->btd", q, layer["out"]), None

    h = lax.scan(step, p["table"][ids], p["layers"])[0] * p["scale"][None, None]
    image = lax.conv_general_dilated(
        jnp.ones((1, 4, 4, 1)),
        p["image"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    logits = h @ p["table"].T * p["count"].astype(jnp.float32)
    return (logits * 0.5 if half else logits), image


IDS = np.zeros((2, 5), np.int32)


def test_table():
    table = jl.sites(model, PARAMS, IDS, half=True)
    got = {s.path: (s.kinds, s.ops, s.flops) for s in table}
    tokens = 2 * 5
    assert got == {
        "table": ("io", ("gather", "dot"), 2 * tokens * 6 * 11),
        "layers/query/kernel": ("sioo", ("dot",), 3 * 2 * tokens * 6 * 6),
        "layers/query/bias": ("soo", ("add",), 0),
        "layers/out": ("siio", ("dot",), 3 * 2 * tokens * 6 * 6),
        "image": ("iiio", ("conv",), 2 * 3 * 3 * 4 * (2 * 2 * 1)),
        "scale": ("o", ("mul",), 0),
    }
    lines = [line.split() for line in str(table).splitlines()]
    assert [line[0] for line in lines] == sorted(got)
    assert lines[1] == "layers/out s i i o (3, 2, 3, 6) float32 dot 2.16 kFLOP".split()
    assert lines[2] == "layers/query/bias s o o (3, 2, 3) float32 add".split()
    assert len(table) == 6 and table["scale"].d_out == 6


def test_nothing_runs():
    """The walk of abstract arguments: a function that would need terabytes."""
    big = {"w": jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)
    (site,) = jl.sites(lambda p, x: x @ p["w"], big, x)
    assert site.flops == 2 * 10**18 and "2e+06 TFLOP" in str(
        jl.sites(lambda p, x: x @ p["w"], big, x)
    )


def test_a_weight_that_lift_would_refuse_shows_why():
    table = jl.sites(lambda p, x: jnp.sum(p["w"]) * x, {"w": leaf(3, 4)}, leaf(2, 3))
    assert table["w"].ops == ("reduce_sum",)


def test_a_part_of_a_weight_is_a_site():
    table = jl.sites(lambda p, x: x @ p["w"][:, 1:3], {"w": leaf(3, 4)}, leaf(2, 3))
    assert (table["w"].kinds, table["w"].ops, table["w"].views) == ("io", ("dot",), ("slice",))
    assert table["w"].flops == 2 * 2 * 3 * 2 and "dot (slice)" in str(table)


def test_an_axis_of_two_roles_is_no_site():
    def fn(p, x):
        return jnp.einsum("ti,ijk->tjk", x, p["w"] + jnp.swapaxes(p["w"], 0, 1))

    table = jl.sites(fn, {"w": leaf(3, 3, 3)}, leaf(2, 3))
    assert table["w"].ops == ("dot of a part",)
    with pytest.raises(ValueError, match=r"consumes whole: \['w \(dot of a part\)'\]"):
        table.select({"w": jl.LoRA()})


def test_a_loop_of_scan_counts_every_step():
    def fn(p, x):
        return lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=7)[0]

    assert jl.sites(fn, {"w": leaf(3, 3)}, leaf(2, 3))["w"].flops == 7 * 2 * 2 * 3 * 3


def chosen(methods):
    return {s.path: m for s, m in jl.sites(model, PARAMS, IDS).select(methods)}


def test_patterns():
    lora, other = jl.LoRA(2), jl.LoRA(4)
    assert set(chosen({"all-linear": lora})) == {"layers/query/kernel", "layers/out"}
    assert set(chosen({"": lora})) == {"layers/query/kernel", "layers/out", "table", "image"}
    first = chosen({"query": lora, "layers": other})
    assert first == {"layers/query/kernel": lora, "layers/out": other}


@pytest.mark.parametrize(
    "methods, message",
    [
        ({}, "got no patterns"),
        ({"layer/quary": jl.LoRA()}, r"matches no site; nearest: \['layers/query/kernel'"),
        (
            {"scale": jl.LoRA()},
            r"matches only leaves that no matmul consumes whole: \['scale \(mul\)'\]",
        ),
        (
            {"layers": jl.LoRA(), "out": jl.LoRA(2)},
            r"'out' .* has no site left: earlier patterns took",
        ),
        ({"(": jl.LoRA()}, "is not a regular expression"),
        ({"out": "LoRA"}, "got 'LoRA', expected a Method"),
    ],
)
def test_bad_patterns(methods, message):
    """L10: an unmatched or empty pattern is an error that lists near misses."""
    with pytest.raises(ValueError, match=message):
        chosen(methods)


def test_all_linear_without_linear_layers():
    with pytest.raises(ValueError, match=r"'all-linear'.*matches no site"):
        jl.sites(lambda p, i: p["e"][i], {"e": leaf(3, 4)}, IDS).select({"all-linear": jl.LoRA()})


def test_keywords_of_the_model_may_have_any_name():
    def fn(p, x, *, key, params, fn, ctx, adapter, methods):
        return x @ p["w"] * (key + params + fn + ctx + adapter + methods)

    own: dict[str, Any] = {"key": 1.0, "params": 2.0, "fn": 3.0, "adapter": 4.0}
    rest = {"ctx": 5.0, "methods": 6.0}
    params, x = {"w": leaf(3, 4)}, leaf(2, 3)
    table = jl.sites(fn, params, x, **own, **rest)
    assert table["w"].ops == ("dot",)
    adapter = jl.init(
        jax.random.key(0), fn, params, x, methods={"w": jl.LoRA(2)}, model_kwargs=rest, **own
    )
    y = jl.lift(fn)(params, adapter, x, model_kwargs=rest, **own)
    jitted = jax.jit(jl.lift(fn))(params, adapter, x, model_kwargs=rest, **own)
    np.testing.assert_allclose(jitted, y, rtol=1e-6)
    np.testing.assert_allclose(y, fn(params, x, **own, **rest))
    np.testing.assert_allclose(jl.lift(fn)(params, {}, x, model_kwargs=rest, **own), y)


MASK = np.arange(12).reshape(3, 4) % 2 > 0


@jax.custom_vjp
def product(w, x):
    return x @ w


product.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))

HIDDEN = {  # name -> (function of (w, x), what the message says)
    "masked": (lambda w, x: x @ jnp.where(MASK, w, 0.0), r"w \(3, 4\): dot after select_n.*sites"),
    "quantised": (lambda w, x: x @ (jnp.round(w * 8) / 8), r"dot after round"),
    "normalised": (
        lambda w, x: x @ (w / jnp.sqrt(jnp.sum(w**2, axis=0, keepdims=True))),
        r"'reduce_sum' at .*sites_test",
    ),
    "masked in a scan": (
        lambda w, x: lax.scan(lambda h, m: (h, x @ (w * m)), x, jnp.stack([MASK * 1.0] * 2))[1],
        r"dot after mul",
    ),
    "its own gradient": (
        product,
        r"custom_vjp_call; needs the merged weight for 'custom_vjp_call'",
    ),
    "two roles": (lambda w, x: x @ (w @ w.T) @ (w + 1) @ w.T, None),
    "sum over copies": (
        lambda w, x: x @ jnp.broadcast_to(w[0], (3, w.shape[1])),
        "has two roles",
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_all_linear_names_what_it_would_leave_out(name):
    use, message = HIDDEN[name]
    params = {"v": leaf(3, 3), "w": leaf(3, 4)}

    def fn(p, x):
        return use(p["w"], x @ p["v"])

    methods = {"all-linear": jl.LoRA(2)}
    if message is None:
        assert len(jl.init(jax.random.key(0), fn, params, leaf(2, 3), methods=methods).sites) == 2
        return
    with pytest.raises(ValueError, match=f"(?s)cannot adapt all weights:\n  .*{message}"):
        jl.init(jax.random.key(0), fn, params, leaf(2, 3), methods=methods)
    rest = jl.init(jax.random.key(0), fn, params, leaf(2, 3), methods={"^w": None, **methods})
    assert [s.path for s, _ in rest.sites] == ["v"]


@pytest.mark.parametrize("name", ["masked", "quantised", "normalised", "masked in a scan"])
def test_merging_works_from_init_on(name):
    use, _ = HIDDEN[name]
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)}
    x = leaf(2, 3)

    def fn(p, x):
        return use(p["w"], x)

    methods = {"all-linear": jl.LoRA(2)}
    adapter = jl.init(jax.random.key(0), fn, params, x, methods=methods, on_dense="merge")
    assert adapter.sites[0][0].kinds == "io"
    adapter = adapter.replace(trainable=jax.tree.map(lambda t: t + 0.3, adapter.trainable))
    y = jl.lift(fn, on_dense="merge")(params, adapter, x)
    np.testing.assert_allclose(y, fn(jl.merge(params, adapter), x), rtol=1e-5)
    assert np.abs(y - fn(params, x)).max() > 0.01
    with pytest.raises(jl.DenseWeightError):
        jl.lift(fn)(params, adapter, x)


def test_values_that_are_no_weights_do_not_stop_all_linear():
    """Biases, gains, positions, class tokens and tables alongside a matmul."""
    params = {
        "w": leaf(4, 4), "bias": leaf(2, 2), "positions": leaf(3, 4), "token": leaf(1, 4),
        "table": leaf(5, 4),
    }  # fmt: skip

    def fn(p, x):
        h = jnp.concatenate([p["token"], x + p["positions"][1:]], axis=0)
        h = (h @ p["w"]).reshape(3, 2, 2) * p["bias"][None] + p["bias"][None]
        return h.reshape(3, 4) @ p["table"].T, p["table"][jnp.array([0, 1])]

    adapter = jl.init(jax.random.key(0), fn, params, leaf(2, 4), methods={"all-linear": jl.LoRA(2)})
    assert [s.path for s, _ in adapter.sites] == ["w"]


def test_a_pattern_without_a_site_lists_what_the_function_uses():
    with pytest.raises(ValueError) as error:
        chosen({"layer/quary": jl.LoRA()})
    text = str(error.value)
    assert "\n  layers/query/kernel (3, 6, 2, 3): dot\n" in text
    assert "\n  scale (6,): mul; needs the merged weight for 'mul' at " in text
    with pytest.raises(ValueError, match="uses no floating array of params"):
        jl.sites(lambda p, x: x, {"w": leaf(3, 4)}, leaf(2)).select({"w": jl.LoRA()})
    with pytest.raises(ValueError, match=r"'heads' of None matches no site"):
        chosen({"heads": None, "all-linear": jl.LoRA()})
