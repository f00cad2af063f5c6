"""Linear views of a weight, for every kind of method: lifting equals merging, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from tests.core.conftest import FAST, equations, noisy


def w(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1])


X = w(3, 4, seed=0)  # [rows, d_in]


@jax.custom_vjp
def clipped(w):
    return w


clipped.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_jvp
def halved(w):
    return w


halved.defjvp(lambda w, t: (w[0], 0.5 * t[0]))

GAIN = np.array([0.5, 2.0, -1.0, 3.0])


def layers(x, ws):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0]


def blocks(ws, x):
    block = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w[:, :4]), None))
    return lax.scan(block, x, ws)[0]


# name -> (function of (w, x [3, 4]), shape of w)
ONE = {
    "columns": (lambda w, x: x @ w[:, 1:3], (4, 6)),
    "columns with a step": (lambda w, x: x @ w[:, ::2], (4, 6)),
    "rows": (lambda w, x: x[:, 1:3] @ w[1:3], (4, 6)),
    "rows and columns": (lambda w, x: x[:, :2] @ w[2:, 2:5], (4, 6)),
    "one column": (lambda w, x: x @ w[:, 2], (4, 6)),
    "qkv split": (lambda w, x: [x @ t for t in jnp.split(w, 3, axis=1)], (4, 6)),
    "in_proj": (lambda w, x: jnp.tanh(x @ w[:4].T) @ w[4:], (8, 4)),
    "heads": (lambda w, x: jnp.einsum("td,dnh->tnh", x, w[:, 1:, :]), (4, 3, 2)),
    "heads of a reshape": (
        lambda w, x: jnp.einsum("td,dnh->tnh", x, w.reshape(4, 3, 2)[:, 1:]),
        (4, 6),
    ),
    "heads, swapped, cut": (
        lambda w, x: x @ jnp.swapaxes(w, 1, 2).reshape(4, 6)[:, 1:4],
        (4, 3, 2),
    ),
    "dynamic columns": (
        lambda w, x: x @ lax.dynamic_slice_in_dim(w, jnp.argmax(x[0]), 2, axis=1),
        (4, 6),
    ),
    "dynamic rows": (
        lambda w, x: x[:, :2] @ lax.dynamic_slice_in_dim(w, jnp.argmax(x[0]), 2, axis=0),
        (4, 6),
    ),
    "cut in a scan": (blocks, (3, 4, 6)),
    "cut before a scan": (lambda w, x: layers(x, w[:, :, :4]), (2, 4, 6)),
    "slice of one of a stack": (lambda w, x: x @ w[1, :, :2], (2, 4, 6)),
    "cut in a vmap": (lambda w, x: jax.vmap(lambda r: w[:, :3].T @ r)(x), (4, 6)),
    "number": (lambda w, x: x @ (w * 0.3), (4, 6)),
    "number, negated": (lambda w, x: x @ (-w / 1.5), (4, 6)),
    "of the input": (lambda w, x: x @ (x[0, 0] * w), (4, 6)),
    "row gain": (lambda w, x: x @ (w * GAIN[:, None]), (4, 6)),
    "column gain": (lambda w, x: x @ (w / GAIN[None]).T, (3, 4)),
    "gain of layers": (
        lambda w, x: layers(x, w * (GAIN[:2, None] * GAIN[None])[..., None]),
        (2, 4, 4),
    ),
    "gain of a part": (lambda w, x: x @ (2 * w[:, :4] * GAIN[None]), (4, 6)),
    "two halves": (lambda w, x: x @ jnp.concatenate([w[:, 3:], w[:, :3]], 1), (4, 6)),
    "rolled": (lambda w, x: x @ jnp.roll(w, 1, axis=0), (4, 6)),
    "zeros below": (
        lambda w, x: x @ jnp.concatenate([w, jnp.zeros((2, 6), w.dtype)]),
        (2, 6),
    ),
    "difference": (lambda w, x: x @ (w[:, :3] - w[:, 3:]), (4, 6)),
    "shifted": (lambda w, x: x @ (w + 1.0), (4, 6)),
    "stack": (lambda w, x: layers(x, jnp.stack([w[:, :4], w[:, 4:]])), (4, 8)),
    "pad": (lambda w, x: x @ jnp.pad(w, ((0, 0), (1, 2))), (4, 6)),
    "pad with ones": (lambda w, x: x @ jnp.pad(w, ((1, 1), (0, 0)), constant_values=1.0), (2, 6)),
    "padded vocabulary": (
        lambda w, x: (lambda e: e[jnp.array([0, 3, 5])] @ e.T)(jnp.pad(w, ((0, 2), (0, 0)))),
        (4, 6),
    ),
    "flip": (lambda w, x: x @ w[::-1, ::-1], (4, 6)),
    "tile": (lambda w, x: x @ jnp.tile(w, (2, 3)), (2, 4)),
    "repeated rows and columns": (
        lambda w, x: x @ jnp.repeat(jnp.repeat(w, 2, axis=0), 3, axis=1),
        (2, 3),
    ),
    "repeated heads": (
        lambda w, x: jnp.einsum("td,dnh->tnh", x, jnp.repeat(w, 2, axis=1)),
        (4, 2, 3),
    ),
    "repeated layers": (lambda w, x: layers(x, jnp.repeat(w, 2, axis=0)), (2, 4, 4)),
    "repeated unevenly": (lambda w, x: x @ jnp.repeat(w, np.array([1, 3]), axis=0), (2, 3)),
    "permuted": (lambda w, x: x @ w[np.array([2, 0, 3, 1])][:, np.array([1, 0])], (4, 3)),
    "symmetric": (lambda w, x: x @ (0.5 * (w + w.T)), (4, 4)),
    "antisymmetric, of layers": (
        lambda w, x: layers(x, w - jnp.swapaxes(w, 1, 2)),
        (2, 4, 4),
    ),
    "and its transpose": (lambda w, x: x @ jnp.concatenate([w, w.T], 1), (4, 4)),
    "broadcast": (
        lambda w, x: jnp.einsum(
            "bti,bio->bto", x[None] + x[:2, None], jnp.broadcast_to(w, (2, 4, 6))
        ),
        (4, 6),
    ),
    "custom_vjp": (lambda w, x: x @ clipped(w), (4, 6)),
    "custom_jvp": (lambda w, x: x @ halved(w), (4, 6)),
    "squared": (lambda w, x: x @ (w @ w), (4, 4)),
    "gram": (lambda w, x: x @ (w.T @ w), (6, 4)),
    "convolution, transposed kernel": (
        lambda w, x: lax.conv_transpose(
            x[None], w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), transpose_kernel=True
        ),
        (3, 6, 4),
    ),
    "convolution, cut": (
        lambda w, x: lax.conv_general_dilated(
            x[None], w[:, :, :3], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 4, 6),
    ),
}  # fmt: skip

FEW = ("qkv split", "in_proj", "cut before a scan", "row gain", "zeros below", "flip", "broadcast")

METHODS = {
    "LoRA": jl.LoRA(2, 4.0),
    "DoRA": jl.DoRA(2, 4.0),
    "OFT": jl.OFT(2),
    "IA3": jl.IA3(),
    "HiRA": jl.HiRA(2),
    "LoKr": jl.LoKr(2),
}


def compared(fn, params, methods, x):
    """{output or gradient: (lifted, merged)} of one program; the adapter is off its init."""
    cast = functools.partial(jax.tree.map, lambda t: jnp.asarray(t, jnp.float64))
    params, x = cast((params, x))
    adapter = jl.init(jax.random.key(0), fn, params, x, methods=methods)
    adapter = adapter.replace(trainable=noisy(adapter.trainable))

    def both(trainable, params, x):
        def loss(run, trainable, params, x):
            out = run(params, adapter.replace(trainable=trainable), x)
            return sum(jnp.sum(jnp.sin(t)) for t in jax.tree.leaves(out)), out

        def merged(p, a, x):
            return fn(jl.merge(p, a), x)

        value = functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
        return [
            value(functools.partial(loss, run))(trainable, params, x)
            for run in (jl.lift(fn), merged)
        ]

    ((_, y1), g1), ((_, y2), g2) = jax.jit(both, compiler_options=FAST)(
        adapter.trainable, params, x
    )
    return adapter, {
        "y": (y1, y2),
        "trainable": (g1[0], g2[0]),
        "w": (g1[1], g2[1]),
        "x": (g1[2], g2[2]),
    }


def check(found):
    for name, (got, expected) in found.items():
        flat = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
        for (path, a), b in flat:
            where = name + jax.tree_util.keystr(path)
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11, err_msg=where)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("method", METHODS)
def test_views_of_one_weight(method):
    """All forms with factors and without; the other methods take one of the two ways."""
    forms = {name: form for name, form in ONE.items() if method in ("LoRA", "DoRA") or name in FEW}

    def fn(p, x):
        return {name: use(p[name], x) for name, (use, _) in forms.items()}

    params = {name: w(*shape) for name, (_, shape) in forms.items()}
    adapter, found = compared(fn, params, {"": METHODS[method]}, X)
    assert len(adapter.sites) == len(forms)
    check(found)


# name -> (function of (the leaves w, v; x), their shapes)
TWO = {
    "outputs of two": (lambda w, v, x: x @ jnp.concatenate([w, v], 1), (4, 6), (4, 3)),
    "inputs of two": (lambda w, v, x: x @ jnp.concatenate([w, v], 0), (2, 6), (2, 6)),
    "a transposed one": (lambda w, v, x: x @ jnp.concatenate([w, v.T], 1), (4, 6), (3, 4)),
    "in one scan": (lambda w, v, x: layers(x, jnp.stack([w, v])), (4, 4), (4, 4)),
    "two stacks": (lambda w, v, x: layers(x, jnp.concatenate([w, v])), (2, 4, 4), (1, 4, 4)),
    "outputs stacked": (
        lambda w, v, x: jnp.einsum("ti,kio->kto", x, jnp.stack([w, v])),
        (4, 6),
        (4, 6),
    ),
    "sum": (lambda w, v, x: x @ (w - 2 * v), (4, 6), (4, 6)),
    "product": (lambda w, v, x: x @ (w @ v), (4, 2), (2, 6)),
    "heads": (
        lambda w, v, x: jnp.einsum("td,dnh->tnh", x, jnp.concatenate([w, v], 1))[:, 1:],
        (4, 2, 2),
        (4, 1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_views_of_two_weights(method):
    def fn(p, x):
        return {name: use(p["w " + name], p["v " + name], x) for name, (use, _, _) in TWO.items()}

    params = {f"w {name}": w(*shape) for name, (_, shape, _) in TWO.items()}
    params |= {f"v {name}": w(*shape, seed=2) for name, (_, _, shape) in TWO.items()}
    adapter, found = compared(fn, params, {"": METHODS[method]}, X)
    assert len(adapter.sites) == 2 * len(TWO)
    check(found)


def test_ragged_experts():
    """Rows in groups, as sparse mixtures run them; a group may be empty."""
    sizes = jnp.array([2, 0, 1])
    swap = lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])

    def fn(p, x):
        up = lax.ragged_dot(x, p["w"], sizes)
        return lax.ragged_dot_general(jnp.tanh(up), p["v"], sizes, swap)

    for method in ("LoRA", "DoRA"):
        adapter, found = compared(
            fn, {"w": w(3, 4, 6), "v": w(3, 4, 6)}, {"all-linear": METHODS[method]}, X
        )
        assert [s.kinds for s, _ in adapter.sites] == ["soi", "sio"]
        check(found)


def test_dropout_in_a_view_is_that_of_the_whole():
    """With a key, LoRA's own `apply` runs on the part in view, with the same draws."""
    params = {"w": jnp.asarray(w(4, 6))}
    methods = {"w": jl.LoRA(2, dropout=0.5)}
    whole = lambda p, x: x @ p["w"]  # noqa: E731
    adapter = jl.init(jax.random.key(0), whole, params, jnp.asarray(X), methods=methods)
    adapter = adapter.replace(trainable=noisy(adapter.trainable))

    def run(fn):
        return jl.lift(fn)(params, adapter, jnp.asarray(X), ctx={"key": jax.random.key(3)})

    expected = run(whole)
    assert np.abs(expected - whole(jl.merge(params, adapter), X)).max() > 1e-3
    np.testing.assert_allclose(run(lambda p, x: x @ p["w"][:, 2:5]), expected[:, 2:5], rtol=1e-12)
    np.testing.assert_allclose(run(lambda p, x: x @ (2 * p["w"])), 2 * expected, rtol=1e-12)


def test_a_method_that_reads_the_context_has_no_views():
    params, x = {"w": jnp.asarray(w(4, 6))}, jnp.asarray(X)
    masked = jl.TokenMask(jl.LoRA(2))
    adapter = jl.init(jax.random.key(0), lambda p, x: x @ p["w"], params, x, methods={"w": masked})
    with pytest.raises(jl.DenseWeightError, match="'slice' at"):
        jl.lift(lambda p, x: x @ p["w"][:, :3])(params, adapter, x, ctx={"mask": jnp.ones(3)})


def test_a_view_has_no_dense_delta():
    """Neither the value nor the gradient has a matmul of the shape of the weight."""
    use, shape = ONE["in_proj"]
    params, x = {"w": jnp.asarray(w(*shape))}, jnp.asarray(X)
    fn = lambda p, x: use(p["w"], x)  # noqa: E731
    adapter = jl.init(jax.random.key(0), fn, params, x, methods={"w": jl.LoRA(2)})

    def loss(t):
        return jnp.sum(jl.lift(fn)(params, adapter.replace(trainable=t), x))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter.trainable).jaxpr
    shapes = {
        tuple(sorted(e.outvars[0].aval.shape))
        for e in equations(jaxpr)
        if e.primitive.name == "dot_general"
    }
    assert not shapes & {(4, 8), (4, 4)}, shapes
    assert (3, 4) in shapes


BRANCHES = {  # name -> function of (w [4, 6], v [4, 6], x)
    "one of two": lambda w, v, x: x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: v),
    "slices of one": lambda w, v, x: (
        x @ lax.switch(1, [lambda: w[:, :3], lambda: w[:, 3:]]) + v[0, 0]
    ),
    "scaled or not": lambda w, v, x: x @ lax.cond(x[0, 0] > 0, lambda: 2 * w, lambda: v),
    "or zeros": lambda w, v, x: (
        x @ lax.cond(x[0, 0] < 9, lambda: w, lambda: jnp.zeros((4, 6))) @ v.T
    ),
}


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_a_weight_that_a_branch_returns(method):
    def fn(p, x):
        return {name: use(p["w " + name], p["v " + name], x) for name, use in BRANCHES.items()}

    params = {f"w {name}": w(4, 6) for name in BRANCHES}
    params |= {f"v {name}": w(4, 6, seed=2) for name in BRANCHES}
    adapter, found = compared(fn, params, {"^v slices": None, "": METHODS[method]}, X)
    assert len(adapter.sites) == 2 * len(BRANCHES) - 1
    check(found)
