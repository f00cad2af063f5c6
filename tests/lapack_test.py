"""No batched factorisation that a CPU kernel would divide between the threads it waits for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jlora import lapack


def symmetric(x):
    """Element by element: a batched product may be rounded in another way than a single one."""
    square = x[..., : x.shape[-1], :]
    return square + jnp.swapaxes(square, -1, -2) + 30.0 * jnp.eye(x.shape[-1])[None, None]


CASES = {
    "qr": (jnp.linalg.qr, r"lapack_sgeqrf"),
    "svd": (lambda x: jnp.linalg.svd(x, full_matrices=False), r"lapack_sgesdd"),
    "eigh": (lambda x: jnp.linalg.eigh(symmetric(x)), r"lapack_ssyevd"),
    "cholesky": (lambda x: jnp.linalg.cholesky(symmetric(x)), r"lapack_spotrf"),
}

pytestmark = pytest.mark.skipif(
    not lapack.concerned(), reason="this jaxlib's kernels do not divide a batch"
)


@pytest.fixture(autouse=True)
def installed():
    """As after jlora's first factorisation."""
    lapack.ensure()


@pytest.fixture
def key():
    return jax.random.key(0)


def kernels(text, name):
    """The leading dimensions of the first operand of every call of a kernel in a lowered text."""
    found = re.findall(rf"custom_call @{name}_ffi\(.*?: \(tensor<([\dx]*)xf32>", text)
    return [tuple(int(d) for d in shape.split("x"))[:-2] for shape in found]


@pytest.mark.parametrize("name", CASES)
def test_large_batch_is_a_loop(name, key):
    f, kernel = CASES[name]
    x = jax.random.normal(key, (3, 4, 40, 24))
    assert lapack.parallel([x.shape])
    assert kernels(jax.jit(f).lower(x).as_text(), kernel) == [()]
    got = jax.tree.leaves(jax.jit(f)(x))
    for i in np.ndindex(3, 4):
        want = jax.tree.leaves(jax.jit(f)(x[i][None, None]))
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(g[i], w[0, 0])


def test_what_vmap_and_grad_make(key):
    def loss(x):
        u, s, _ = jnp.linalg.svd(x, full_matrices=False)
        return jnp.sum(u[:, 0] ** 2 * s[0])

    x = jax.random.normal(key, (12, 40, 24))
    f = jax.jit(jax.vmap(jax.grad(loss)))
    assert kernels(f.lower(x).as_text(), "lapack_sgesdd") == [()]
    np.testing.assert_allclose(f(x)[7], jax.grad(loss)(x[7]), atol=1e-4)


def test_small_batch_stays_one_call(key):
    x = jax.random.normal(key, (5, 8, 4))
    assert not lapack.parallel([x.shape])
    text = jax.jit(jnp.linalg.qr).lower(x).as_text()
    assert kernels(text, "lapack_sgeqrf") == [(5,)]


def test_sharded_batch(key):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(key, (8, 40, 24))
    put = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    f = jax.jit(lambda x: jnp.linalg.svd(x, compute_uv=False))
    np.testing.assert_allclose(f(put), f(x), rtol=1e-5)


def test_explicit_mesh_keeps_the_form_of_jax(key):
    """Its loop would have to name shardings; the values are those of one device."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.random.normal(key, (4, 40, 24))
    f = jax.jit(jnp.linalg.cholesky)
    square = jnp.einsum("bij,bik->bjk", x, x) + jnp.eye(24)[None]
    with jax.set_mesh(mesh):
        put = jax.device_put(square, NamedSharding(mesh, PartitionSpec()))
        assert "stablehlo.while" not in f.lower(put).as_text()
        np.testing.assert_allclose(f(put), f(square), atol=1e-4)
    assert lapack.parallel([square.shape]) and "stablehlo.while" in f.lower(square).as_text()


def test_bound_is_above_the_kernels_estimates():
    m, n = 40, 24
    estimates = {"gesdd": 10 * m * n * n, "geqrf": 2 * m * n * n, "syevd": 5 * n**3, "geev": n**3}
    for cost in estimates.values():
        batch = max(2, -(-lapack.ALONE // cost))
        assert lapack.parallel([(batch, m, n)])
    assert not lapack.parallel([(1, 2048, 2048)]) and not lapack.parallel([(2048, 2048)])


def test_releases():
    ours = {v: lapack.concerned(v) for v in ("0.8.0", "0.9.0", "0.9.1", "0.10.2", "0.11.0")}
    assert ours == {"0.8.0": False, "0.9.0": False, "0.9.1": True, "0.10.2": True, "0.11.0": True}
    assert not lapack.concerned("0.11.2") and not lapack.concerned("0.12.0.1")


def test_installed_once():
    assert lapack.install() == []


LAZY = """
import sys, jax, jax.numpy as jnp
from jax._src.interpreters import mlir
from jax._src.lax import linalg
rule = lambda: mlir._platform_specific_lowerings["cpu"][linalg.svd_p].rule
before = rule()
import jlora as jl
assert rule() is before, "the import changes JAX"
jl.numerics.svd(jnp.ones((2, 2)))
print(rule() is not before)
"""


@pytest.mark.parametrize(("switch", "changed"), [("1", "True"), ("0", "False")])
def test_nothing_happens_before_the_first_factorisation_and_it_can_be_switched_off(switch, changed):
    env = {**os.environ, "JLORA_LAPACK": switch, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", LAZY], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == changed
