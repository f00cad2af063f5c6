"""Covariance matrix adaptation: minimises a function of a few numbers without its gradient.

============  ==================================================================
m, s, C       mean [n], step size and covariance [n, n] of the search
x_i, y_i      samples, x_i = m + s y_i with y_i ~ N(0, C), best first
w_i, mu       weights of the better half, log(mu + 1/2) - log i, and its size
p_s, p_c      evolution paths of the step size and of the covariance
============  ==================================================================

.. math:: m \\leftarrow m + s \\sum_i w_i y_i, \\qquad
          C \\leftarrow (1 - c_1 - c_\\mu) C + c_1 p_c p_c^T + c_\\mu \\sum_i w_i y_i y_i^T, \\qquad
          s \\leftarrow s \\, e^{(c_s / d_s)(\\|p_s\\| / E\\|N(0, I)\\| - 1)}

A sample outside of [-bound, bound] is scored at the nearest point inside plus its squared distance.
One generation is one call of the function under `vmap`.

Paper: Hansen 2016, The CMA evolution strategy: a tutorial, arXiv:1604.00772.
Source: paper, default strategy parameters.
Deviates: no negative weights; C is factored anew each generation.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PRNGKeyArray

from jlora import numerics
from jlora.system import System


class Found(NamedTuple):
    """The result of a search."""

    best: Array  # [n], the best sample of all
    value: Array  # its value
    values: Array  # [generations], the best value of each


def population(n: int) -> int:
    """How many samples a generation has.

    Args:
      n: numbers that are searched for.

    Returns:
      4 + floor(3 log n).
    """
    return 4 + int(3 * math.log(n))


def minimise(
    f: Callable[[Float[Array, "n"]], Float[Array, ""]],
    start: Float[Array, "n"],
    key: PRNGKeyArray,
    *,
    generations: int,
    sigma: float = 0.5,
    bound: float | None = None,
) -> Found:
    """Searches for the minimum of a function of a few numbers.

    Args:
      f: what is minimised.
      start: the first mean.
      key: of the samples.
      generations: how many, at least 1.
      sigma: spread of the first samples, > 0; 0.5.
      bound: of the absolute value of each number, > 0; None: none.

    Returns:
      The best point, its value, and the best value of each generation.

    Raises:
      ValueError: generations < 1, sigma <= 0 or bound <= 0.
    """
    if generations < 1 or sigma <= 0 or (bound is not None and bound <= 0):
        raise ValueError(
            f"generations, sigma, bound: got {generations}, {sigma}, {bound}, "
            "expected >= 1, > 0 and > 0 or None"
        )
    n, size = start.shape[0], population(start.shape[0])
    mu = size // 2
    raw = [math.log(mu + 0.5) - math.log(i + 1) for i in range(mu)]
    share = [t / sum(raw) for t in raw]
    w, eff = jnp.asarray(share, start.dtype), 1 / sum(t * t for t in share)
    cc = (4 + eff / n) / (n + 4 + 2 * eff / n)
    cs = (eff + 2) / (n + eff + 5)
    c1 = 2 / ((n + 1.3) ** 2 + eff)
    cmu = min(1 - c1, 2 * (eff - 2 + 1 / eff) / ((n + 2) ** 2 + eff))
    damp = 1 + 2 * max(0.0, math.sqrt((eff - 1) / (n + 1)) - 1) + cs
    chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    eye = jnp.eye(n, dtype=start.dtype)

    def score(x: Array) -> Array:
        if bound is None:
            return f(x)
        inside = jnp.clip(x, -bound, bound)
        return f(inside) + jnp.sum((x - inside) ** 2)

    def generation(state, at):
        mean, s, c, ps, pc, best, value = state
        values, vectors = numerics.eigh(c)
        root = jnp.sqrt(jnp.maximum(values, 1e-12))[None, :]
        z = jax.random.normal(jax.random.fold_in(key, at), (size, n), start.dtype)
        y = z * root @ vectors.T
        x = mean[None, :] + s * y
        got = jax.vmap(score)(x)
        order = jnp.argsort(got)
        y, x, first = y[order], x[order], got[order[0]]
        move = w @ y[:mu]
        whitened = vectors @ ((vectors.T @ move) / root[0])
        ps = (1 - cs) * ps + math.sqrt(cs * (2 - cs) * eff) * whitened
        length = jnp.sqrt(jnp.sum(ps * ps))
        aged = 1 - (1 - cs) ** (2 * (at + 1).astype(start.dtype))
        going = (length / jnp.sqrt(aged) < (1.4 + 2 / (n + 1)) * chi).astype(start.dtype)
        pc = (1 - cc) * pc + going * math.sqrt(cc * (2 - cc) * eff) * move
        lost = c1 * (1 - going) * cc * (2 - cc)
        spread = jnp.einsum("k,ki,kj->ij", w, y[:mu], y[:mu])
        c = (1 - c1 - cmu + lost) * c + c1 * pc[:, None] * pc[None, :] + cmu * spread
        better = first < value
        best = jnp.where(better, x[0] if bound is None else jnp.clip(x[0], -bound, bound), best)
        value = jnp.where(better, first, value)
        s_new = s * jnp.exp(jnp.minimum(1.0, (cs / damp) * (length / chi - 1)))
        return (mean + s * move, s_new, (c + c.T) / 2, ps, pc, best, value), first

    zero = jnp.zeros_like(start)
    first = (start, jnp.asarray(sigma, start.dtype), eye, zero, zero, start, score(start))
    state, values = lax.scan(generation, first, jnp.arange(generations))
    return Found(state[5], state[6], values)


SYSTEM = System(
    name="CMA-ES",
    paper="Hansen 2016, 1604.00772",
    symbol="minimise",
    evidence="bottom of a valley of condition 1000; corner of a box; mutation check",
    kind="component",
    tests=("", "tests/merging/learned/lorahub_test.py"),
)
