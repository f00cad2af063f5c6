"""LoRA-FAIR: factors are averaged, then the server corrects one of them towards the true average.

============  =====================================================================
u_k, v_k      factors of client k; means u, v as in `fedavg`
D             the exact average, sum p_k u_k v_k (never formed)
c             the correction of v, [R, d_out]
lambda        `penalty`, keeps v + c near v, where the clients start next
============  =====================================================================

.. math:: c = \\arg\\min_c \\; S\\bigl(D, u (v + c)\\bigr) + \\lambda \\|c\\|

With `similarity="cos"` S is 1 - cosine, minimised by gradient descent; with `"fro"` the objective
is :math:`\\|D - u(v+c)\\|^2 + \\lambda\\|c\\|^2`, solved in closed form,

.. math:: c = (u^T u + \\lambda I)^{-1} (u^T D - u^T u \\, v).

All of it needs u^T D = sum p_k (u^T u_k) v_k and u^T u only. The cosine is blind to scale: what it
finds may be much smaller than D.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, R], v [R, d_out].

Paper: Bian et al. 2024, arXiv:2411.14961.
Source: notes on the paper for the cosine; the closed form is ours.
Deviates: the step is relative to |v|^2; the penalty is a proximal step, exact at c = 0, where the
gradient of |c| is not a number. Clients that agree get c = 0 exactly.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora import numerics
from jlora.algebra import LowRank
from jlora.contracts.aggregation import Aggregation, Round
from jlora.federated.fedavg import fedavg
from jlora.numerics import einsum


def lora_fair(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    similarity: str = "cos",
    penalty: float = 0.01,
    steps: int = 300,
    rate: float = 0.5,
) -> LowRank:
    """The corrected mean factors of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: shares, summing to 1.
      similarity: "cos", as in the paper, or "fro", in closed form.
      penalty: lambda, at least 0; 0.01, as in the paper.
      steps: of descent with "cos", at least 1; 300.
      rate: of descent; 0.5.

    Returns:
      u [d_in, R], v [R, d_out].

    Raises:
      ValueError: another similarity, a negative penalty, or steps < 1.
    """
    if similarity not in ("cos", "fro"):
        raise ValueError(f"similarity: got {similarity!r}, expected 'cos' or 'fro'")
    if penalty < 0 or steps < 1:
        raise ValueError(f"penalty, steps: got {penalty}, {steps}, expected >= 0 and >= 1")
    u, v = fedavg(bank, weights)
    gram = einsum("ir,is->rs", u, u)
    cross = einsum("ir,nis->nrs", u, bank.u) * weights.astype(u.dtype)[:, None, None]
    target = einsum("nrs,nso->ro", cross, bank.v)  # u^T D
    if similarity == "fro":
        eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
        c = numerics.solve(gram + penalty * eye, target - einsum("rs,so->ro", gram, v))
        return LowRank(u, v + c)
    size, step = _exact_norm(bank, weights), rate * jnp.sum(v * v)

    def distance(c: Array) -> Array:
        y = v + c
        own = jnp.sqrt(jnp.sum(y * einsum("rs,so->ro", gram, y)) + _tiny(v))
        return 1.0 - jnp.sum(target * y) / (own * size + _tiny(v))

    def descend(c: Array, _: None) -> tuple[Array, None]:
        return _shrink(c - step * jax.grad(distance)(c), step * penalty), None

    return LowRank(u, v + lax.scan(descend, jnp.zeros_like(v), None, length=steps)[0])


def _shrink(z: Array, by: Array) -> Array:
    """The proximal step of by * |z|: shorter by `by`, exactly 0 where z is no longer than that."""
    squared = jnp.sum(z * z)
    live = squared > by * by
    norm = jnp.sqrt(jnp.where(live, squared, jnp.ones_like(squared)))
    return jnp.where(live, z * (1.0 - by / norm), jnp.zeros_like(z))


def _exact_norm(bank: LowRank, weights: Array) -> Array:
    """|sum p_k u_k v_k|, scalar."""
    p = weights.astype(bank.u.dtype)
    left, right = (
        einsum("nir,mis->nmrs", bank.u, bank.u),
        einsum("nro,mso->nmrs", bank.v, bank.v),
    )
    squared = jnp.einsum("nmrs,nmrs,n,m->", left, right, p, p, precision=lax.Precision.HIGHEST)
    return jnp.sqrt(jnp.maximum(squared, 0.0) + _tiny(bank.u))


def _tiny(x: Array) -> Array:
    return jnp.asarray(jnp.finfo(x.dtype).tiny, x.dtype)


SYSTEM = Aggregation(
    name="LoRA-FAIR",
    paper="Bian 2024, 2411.14961",
    symbol="lora_fair",
    claim="lora_fair",
    evidence="closed form is stationary; cosine reaches it; equal clients unchanged",
    rows=(67,),
    aggregate=lambda bank, weights: Round(lora_fair(bank, weights)),
)
