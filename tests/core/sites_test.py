"""The abstract walk: kinds and FLOPs against hand counts, patterns, errors."""

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
    table = jl.sites(lambda p, x: x @ (p["w"] * 2), {"w": leaf(3, 4)}, leaf(2, 3))
    assert table["w"].ops == ("mul",)


def test_a_part_of_a_weight_is_no_site():
    table = jl.sites(lambda p, x: x @ p["w"][:, 1:3], {"w": leaf(3, 4)}, leaf(2, 3))
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
