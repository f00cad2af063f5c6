"""Lifting equals merging on plain JAX: every way in which code may hold and use a weight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jlora as jl

LORA = jl.LoRA(2, 4.0)


def w(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1])


X = w(3, 5, 6, seed=0)  # [batch, time, d]
IDS = np.array([[0, 3, 1], [2, 2, 6]], np.int32)

# name -> (function of (params, *args), params, args, expected kinds of leaf "w")
VIEWS = {
    "two layers": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], {"w": w(6, 7), "v": w(7, 4)}, "io"),
    "weight left": (lambda p, x: jnp.einsum("do,btd->obt", p["w"], x), {"w": w(6, 7)}, "io"),
    "transposed": (lambda p, x: x @ p["w"].T, {"w": w(7, 6)}, "oi"),
    "vector": (lambda p, x: x[0, 0] @ p["w"], {"w": w(6, 7)}, "io"),
    "matvec": (lambda p, x: p["w"] @ x[0, 0], {"w": w(7, 6)}, "oi"),
    "heads out": (lambda p, x: jnp.einsum("btd,dnh->bnth", x, p["w"]), {"w": w(6, 2, 4)}, "ioo"),
    "heads out, swapped": (
        lambda p, x: jnp.einsum("btd,dnh->bthn", x, p["w"]),
        {"w": w(6, 2, 4)},
        "ioo",
    ),
    "heads in": (
        lambda p, x: jnp.einsum("btnh,nhd->btd", x.reshape(3, 5, 2, 3), p["w"]),
        {"w": w(2, 3, 7)},
        "iio",
    ),
    "heads in, out first": (
        lambda p, x: jnp.einsum("bthn,dnh->dbt", x.reshape(3, 5, 3, 2), p["w"]),
        {"w": w(7, 2, 3)},
        "oii",
    ),
    "in between outs": (
        lambda p, x: jnp.einsum("btd,ndh->btnh", x, p["w"]),
        {"w": w(2, 6, 4)},
        "oio",
    ),
    "fused qkv": (
        lambda p, x: jnp.einsum("btd,dknh->kbtnh", x, p["w"]),
        {"w": w(6, 3, 2, 2)},
        "iooo",
    ),
    "merged axes": (lambda p, x: x @ p["w"].reshape(6, -1), {"w": w(6, 2, 4)}, "ioo"),
    "split axes": (
        lambda p, x: jnp.einsum("btd,dnh->btnh", x, p["w"].reshape(6, 2, 4)),
        {"w": w(6, 8)},
        "io",
    ),
    "split in": (
        lambda p, x: jnp.einsum("btnh,nhd->btd", x.reshape(3, 5, 2, 3), p["w"].reshape(2, 3, 7)),
        {"w": w(6, 7)},
        "io",
    ),
    "merged after transpose": (
        lambda p, x: x @ p["w"].transpose(2, 1, 0).reshape(6, 8),
        {"w": w(4, 2, 6)},
        "ooi",
    ),
    "new axis": (lambda p, x: jnp.matmul(x[:, None], p["w"][None, None]), {"w": w(6, 7)}, "io"),
    "tensordot": (lambda p, x: jnp.tensordot(x, p["w"], 1), {"w": w(6, 7)}, "io"),
    "vmapped": (lambda p, x: jax.vmap(jax.vmap(lambda x: p["w"] @ x))(x), {"w": w(7, 6)}, "oi"),
    "jitted inside": (lambda p, x: jax.jit(lambda w, x: x @ w)(p["w"], x), {"w": w(6, 7)}, "io"),
    "named": (
        lambda p, x: x @ checkpoint_name(p["w"], "w"),
        {"w": w(6, 7)},
        "io",
    ),
    "barrier": (
        lambda p, x: (lambda a, b: x @ a + x @ b)(*lax.optimization_barrier((p["w"], p["v"]))),
        {"w": w(6, 7), "v": w(6, 7, seed=2)},
        "io",
    ),
    "experts": (lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]), {"w": w(3, 6, 4)}, "sio"),
    "experts, stack inside": (
        lambda p, x: jnp.einsum("etd,dfe->fte", x, p["w"]),
        {"w": w(6, 4, 3)},
        "ios",
    ),
    "experts, left, two stacks": (
        lambda p, x: jnp.einsum("agfd,agtd->gatf", p["w"], jnp.stack([x, 2 * x])),
        {"w": w(2, 3, 4, 6)},
        "ssoi",
    ),
    "unrolled stack": (
        lambda p, x: functools.reduce(lambda h, i: jnp.tanh(h @ p["w"][i]), range(3), x),
        {"w": w(3, 6, 6)},
        "sio",
    ),
    "negative index": (lambda p, x: x @ p["w"][-1], {"w": w(3, 6, 6)}, "sio"),
    "split stack": (
        lambda p, x: functools.reduce(lambda h, w: h @ w[0], jnp.split(p["w"], 3), x),
        {"w": w(3, 6, 6)},
        "sio",
    ),
    "part of a stack": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][1::2])[0],
        {"w": w(5, 6, 6)},
        "sio",
    ),
    "experts by id": (
        lambda p, x: jnp.einsum("bd,bdo->bo", x[:, 0], p["w"][jnp.array([2, 0, 2])]),
        {"w": w(4, 6, 5)},
        "sio",
    ),
    "lookup": (lambda p, x: p["w"][IDS] @ p["v"], {"w": w(7, 6), "v": w(6, 4)}, "io"),
    "lookup by take": (lambda p, x: jnp.take(p["w"], IDS, axis=0), {"w": w(7, 6)}, "io"),
    "lookup of columns": (lambda p, x: jnp.take(p["w"], IDS, axis=1), {"w": w(6, 7)}, "oi"),
    "tied": (lambda p, x: p["w"][IDS] @ p["w"].T, {"w": w(7, 6)}, "io"),
    "lookup under vmap": (
        lambda p, x: jax.vmap(jax.vmap(lambda i: p["w"][i]))(IDS),
        {"w": w(7, 6)},
        "io",
    ),
    "lookup of columns under vmap": (
        lambda p, x: jax.vmap(lambda i: p["w"][:, i])(IDS[0]),
        {"w": w(6, 7)},
        "oi",
    ),
    "tied, lookup under vmap": (
        lambda p, x: jax.vmap(lambda i: p["w"][i])(IDS[0]) @ p["w"].T,
        {"w": w(7, 6)},
        "io",
    ),
    "experts by id under vmap": (
        lambda p, x: jax.vmap(lambda i, x: x @ p["w"][i])(jnp.array([2, 0, 2]), x),
        {"w": w(4, 6, 5)},
        "sio",
    ),
    "loop over a stack": (
        lambda p, x: sum(jnp.tanh(x @ v) for v in p["w"]),
        {"w": w(3, 6, 5)},
        "sio",
    ),
    "used twice": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": w(6, 6)}, "io"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(law, name):
    fn, params, kinds = VIEWS[name]
    adapter = law(fn, params, {"w|v": LORA}, X)
    found = {s.path: s.kinds for s, _ in adapter.sites}
    assert found["w"] == kinds


@pytest.mark.parametrize(
    "spec", ["td,aedf->aetf", "td,aedf->taef", "aedf,td->afet", "atd,aedf->atef", "aedf,etd->aeft"]
)
def test_one_input_for_a_whole_stack(law, spec):
    """The adapter's stack axes are not all axes of x: each slice has its own matrix still."""
    params, lead = {"w": w(2, 3, 6, 4)}, {"atd": (2,), "etd": (3,)}
    (x,) = (w(*lead.get(part, ()), 5, 6) for part in spec[:-6].split(",") if part != "aedf")

    def experts(p, x):
        return jnp.einsum("aetd,aedf->aetf", x, p["w"])

    def fn(p, x):
        return jnp.einsum(spec, *((p["w"], x) if spec.startswith("aedf") else (x, p["w"])))

    adapter = law(fn, params, {"w": LORA}, x, made_for=(experts, [w(2, 3, 5, 6)]))
    assert adapter.sites[0][0].kinds == "ssio"


def loop(p, x):
    return lax.fori_loop(
        0, jnp.asarray(3), lambda i, h: jnp.tanh(h @ p["w"][i]), x
    )  # traced bound: a while loop


def test_while_forward():
    params = {"w": jnp.asarray(w(3, 6, 6), jnp.float32)}
    x = jnp.asarray(X, jnp.float32)
    a = jl.init(jax.random.key(0), loop, params, x, methods={"w": LORA})
    a = a.replace(trainable=jax.tree.map(lambda t: t + 0.3, a.trainable))
    np.testing.assert_allclose(
        jl.lift(loop)(params, a, x), loop(jl.merge(params, a), x), rtol=1e-5, atol=1e-6
    )


def remat(policy, **options):
    def fn(p, x):
        block = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), jnp.sum(h)), policy=policy, **options)
        return lax.scan(block, x, p["w"])

    return fn


POLICIES = {
    "none": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots without batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("h"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["h"],
        names_which_can_be_offloaded=[],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_remat_policies(law, policy):
    law(remat(POLICIES[policy], prevent_cse=False), {"w": w(3, 6, 6)}, {"w": LORA}, X, fresh=True)


@jax.custom_vjp
def square(z):
    return z * z


square.defvjp(lambda z: (z * z, z), lambda z, g: (2 * z * g,))


@jax.custom_jvp
def cube(z):
    return z**3


cube.defjvp(lambda primals, tangents: (cube(*primals), 3 * primals[0] ** 2 * tangents[0]))


def carried(p, x):
    def step(state, _):
        w, h = state
        return (w, jnp.tanh(h @ w)), jnp.sum(h)

    (_, h), sums = lax.scan(step, (p["w"], x), None, length=3)
    return h, sums


def handed_on(p, x):
    h, again = lax.scan(lambda h, w: (jnp.tanh(h @ w), w), x, p["w"])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, again, reverse=True, unroll=2)[0]


def handed_through(wrap):
    """A scan over layers whose step gives each weight back through a call; it is used again."""

    def fn(p, x):
        h, again = lax.scan(wrap(lambda h, w: (jnp.tanh(h @ w), w)), x, p["w"])
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, again)[0]

    return fn


def branches(p, x):
    def step(h, i):
        return lax.cond(i % 2 == 0, lambda h: jnp.tanh(h @ p["w"]), lambda h: 1.5 * h, h), None

    return lax.scan(step, x, jnp.arange(4))[0]


CONTROL = {
    "scan": (lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, p["w"]), w(3, 6, 6)),
    "scan over middle axis": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.swapaxes(p["w"], 0, 1))[
            0
        ],
        w(6, 3, 6),
    ),
    "scan of scan": (
        lambda p, x: lax.scan(
            lambda h, ws: (lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, ws)[0], None),
            x,
            p["w"].reshape(2, 2, 6, 6),
        )[0],
        w(4, 6, 6),
    ),
    "scan of merged stacks": (
        lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["w"].reshape(4, 6, 6))[0],
        w(2, 2, 6, 6),
    ),
    "scan of experts": (
        lambda p, x: lax.scan(lambda h, w: (jnp.einsum("etd,edf->etf", h, w), None), x, p["w"])[0],
        w(2, 3, 6, 6),
    ),
    "carried": (carried, w(6, 6)),
    "handed on": (handed_on, w(4, 6, 6)),
    "handed on through checkpoint": (handed_through(jax.checkpoint), w(3, 6, 6)),
    "handed on through jit in checkpoint": (
        handed_through(lambda f: jax.checkpoint(jax.jit(f))),
        w(3, 6, 6),
    ),
    "carried through checkpoint": (
        lambda p, x: lax.scan(
            jax.checkpoint(lambda s, _: ((s[0], jnp.tanh(s[1] @ s[0])), None)),
            (p["w"], x),
            None,
            length=3,
        )[0][1],
        w(6, 6),
    ),
    "constant of a scan, in branches": (branches, w(6, 6)),
    "switch over a stack": (
        lambda p, x: lax.switch(1, [lambda w: x @ w[0], lambda w: x @ w[1]], p["w"]),
        w(2, 6, 6),
    ),
    "fori": (lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x), w(3, 6, 6)),
    "custom_vjp": (lambda p, x: square(jax.nn.relu(x @ p["w"])), w(6, 7)),
    "custom_jvp": (lambda p, x: cube(jax.nn.gelu(x @ p["w"])), w(6, 7)),
    "map": (lambda p, x: lax.map(lambda row: row @ p["w"], x), w(6, 7)),
    "inner gradient": (
        lambda p, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x),
        w(6, 7),
    ),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_flow(law, name):
    fn, weight = CONTROL[name]
    law(fn, {"w": weight}, {"w": LORA}, X)


# name -> (input shape, kernel shape, dimension numbers, options)
CONVS = {
    "1d": ((2, 9, 3), (3, 3, 4), ("NWC", "WIO", "NWC"), {}),
    "1d causal": ((2, 9, 3), (3, 3, 4), ("NWC", "WIO", "NWC"), {"padding": [(2, 0)]}),
    "2d not square": ((2, 6, 7, 3), (2, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), {"padding": "SAME"}),
    "2d strided": (
        (2, 6, 7, 3),
        (2, 3, 3, 4),
        ("NHWC", "HWIO", "NHWC"),
        {"window_strides": (2, 1)},
    ),
    "2d dilated": ((2, 6, 7, 3), (2, 2, 3, 4), ("NHWC", "HWIO", "NHWC"), {"rhs_dilation": (2, 3)}),
    "2d transposed": (
        (2, 4, 4, 3),
        (2, 2, 3, 4),
        ("NHWC", "HWIO", "NHWC"),
        {"lhs_dilation": (2, 2), "padding": [(1, 0), (0, 1)]},
    ),
    "2d channels first": ((2, 3, 6, 7), (4, 3, 2, 3), ("NCHW", "OIHW", "NCHW"), {}),
    "2d grouped": (
        (2, 6, 7, 4),
        (2, 3, 2, 6),
        ("NHWC", "HWIO", "NHWC"),
        {"feature_group_count": 2},
    ),
    "2d depthwise": (
        (2, 6, 7, 4),
        (2, 3, 1, 8),
        ("NHWC", "HWIO", "NHWC"),
        {"feature_group_count": 4},
    ),
    "2d batch groups": (
        (4, 5, 5, 3),
        (2, 2, 3, 4),
        ("NHWC", "HWIO", "NHWC"),
        {"batch_group_count": 2},
    ),
    "3d": ((2, 4, 5, 6, 2), (2, 3, 2, 2, 3), ("NDHWC", "DHWIO", "NDHWC"), {}),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(law, name):
    shape, kernel, numbers, options = CONVS[name]
    options = {"window_strides": (1,) * (len(shape) - 2), "padding": "VALID"} | options

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **options)

    batches = "batch_group_count" in options  # merges the kernel in place
    adapter = law(fn, {"w": w(*kernel)}, {"w": LORA}, w(*shape, seed=0), structural=not batches)
    site = adapter.sites[0][0]
    assert site.d_out == kernel[numbers[1].index("O")]


def test_scanned_convolution(law):
    def fn(p, x):
        def step(h, k):
            return jnp.tanh(lax.conv(h, k, (1, 1), "SAME")), None

        return lax.scan(step, x, p["w"])[0]

    law(fn, {"w": w(2, 3, 3, 2, 2)}, {"w": LORA}, w(2, 3, 5, 5))


@pytest.mark.parametrize("own_input", [True, False])
def test_convolutions_under_vmap(law, own_input):
    """JAX folds the mapped axis into the features, by a reshape that transposes too."""

    def one(k, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers)

    def fn(p, x):
        return jax.vmap(one, (0, 0 if own_input else None))(p["w"], x if own_input else x[0])

    law(fn, {"w": w(3, 2, 2, 2, 4)}, {"w": LORA}, w(3, 1, 4, 4, 2))


def test_two_adapters_on_one_weight():
    """lift(lift(f)): the second changes what the first left."""

    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    params, x = {"w": jnp.asarray(w(3, 6, 6), jnp.float32)}, jnp.asarray(X, jnp.float32)
    one, two = (jl.init(jax.random.key(k), fn, params, x, methods={"w": LORA}) for k in range(2))
    one, two = (
        a.replace(trainable=jax.tree.map(lambda t: t + 0.2, a.trainable)) for a in (one, two)
    )
    both = jl.lift(jl.lift(fn))(params, two, one, x)
    np.testing.assert_allclose(both, fn(jl.merge(jl.merge(params, one), two), x), rtol=1e-4)


def test_inside_other_transformations():
    """jax.checkpoint, vmap, jvp and scan around a lifted function."""

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"]

    params, x = {"w": jnp.asarray(w(6, 6), jnp.float32)}, jnp.asarray(X, jnp.float32)
    a = jl.init(jax.random.key(0), fn, params, x, methods={"w": LORA})
    a = a.replace(trainable=jax.tree.map(lambda t: t + 0.2, a.trainable))
    merged, tuned = jl.merge(params, a), jl.lift(fn)
    expected = fn(merged, x)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
    close(jax.vmap(lambda x: tuned(params, a, x))(x), expected)
    close(lax.map(lambda x: tuned(params, a, x), x), expected)

    def loss(run, t):
        return jnp.sum(run(params, a.replace(trainable=t), x) ** 2)

    plain = jax.grad(functools.partial(loss, tuned))(a.trainable)
    saved = jax.grad(functools.partial(loss, jax.checkpoint(tuned)))(a.trainable)
    jax.tree.map(close, saved, plain)
    _, tangent = jax.jvp(lambda x: tuned(params, a, x), (x,), (jnp.ones_like(x),))
    close(tangent, jax.jvp(lambda x: fn(merged, x), (x,), (jnp.ones_like(x),))[1])


def test_vectors_are_merged_where_they_are_used(law):
    """A method for biases and norms: nothing dense is at stake, so there is no error."""

    @dataclasses.dataclass(frozen=True)
    class Shift(jl.Method):
        vectors = True

        def init(self, key, site, context):
            return {"v": jnp.zeros(site.d_out, site.param_dtype)}, {}

        def merge(self, w, p):
            return w + p["v"][None]

    def fn(p, x):
        def step(h, layer):
            return jnp.tanh(h * layer["scale"][None, None]) + layer["bias"].reshape(1, 1, 6), None

        return lax.scan(step, x, p)[0]

    adapter = law(fn, {"scale": w(2, 6), "bias": w(2, 2, 3)}, {"scale|bias": Shift()}, X)
    assert [s.kinds for s, _ in adapter.sites] == ["soo", "so"]


def test_arguments_that_are_not_arrays():
    def fn(p, x, *, flip, name=None):
        return {"y": x @ p["w"] * (-1 if flip else 1), "none": None, name: p["bias"]}

    params = {"w": jnp.ones((6, 7)), "bias": jnp.ones(3), "act": jax.nn.relu, "depth": 3}
    x = jnp.asarray(X, jnp.float32)
    a = jl.init(jax.random.key(0), fn, params, x, flip=True, name="n", methods={"w": LORA})
    out = jl.lift(fn)(params, a, x, flip=True, name="n")
    np.testing.assert_allclose(out["y"], -x @ params["w"], rtol=1e-5)
    assert out["none"] is None and out["n"].shape == (3,)


@pytest.mark.parametrize("method", [LORA, jl.DoRA(2), jl.VeRA(2)], ids=["LoRA", "DoRA", "VeRA"])
def test_parameters_that_are_one_array(law, method):
    """Their path is empty, and so is the name of no shared group."""
    adapter = law(lambda p, x: jnp.tanh(x @ p), w(6, 7), {"": method}, X, structural=False)
    assert [s.path for s, _ in adapter.sites] == [""]


def test_empty_adapters():
    """L1: nothing to do is the function itself, bit for bit."""

    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    params, x = {"w": jnp.asarray(w(6, 7), jnp.float32)}, jnp.asarray(X, jnp.float32)
    for empty in ({}, None, jl.Adapter({}, {}, ())):
        np.testing.assert_array_equal(jl.lift(fn)(params, empty, x), fn(params, x))
    assert jl.lift(fn, aux=True)(params, {}, x)[1] == {}


def test_a_bank_without_vmap_is_refused():
    def fn(p, x):
        return x @ p["w"]

    params, x = {"w": jnp.ones((6, 7))}, jnp.ones((3, 6))
    a = jl.init(jax.random.key(0), fn, params, x, methods={"w": LORA})
    with pytest.raises(ValueError, match=r"w: got a scale of shape \(3,\).*of a bank, pick one"):
        jl.lift(fn)(params, jl.stack([a] * 3), x)


def test_two_leaves_of_one_path_are_refused():
    params = {"a/b": jnp.ones((6, 7)), "a": {"b": jnp.ones((6, 7))}}
    with pytest.raises(ValueError, match="two leaves of params have the same path"):
        jl.sites(lambda p, x: x @ p["a/b"] + x @ p["a"]["b"], params, jnp.ones((3, 6)))
