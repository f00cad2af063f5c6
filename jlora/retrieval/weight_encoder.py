"""AutoLoRA, retrieval: an embedding of an adapter that does not depend on how it is factored.

===========  ==================================================================
x_l          learned probes of site l, [P, d_in]
e_l          tokens of site l: what the adapter does to the probes
kind         sites of one kind (all query projections, say) share a projection
z            embedding, [out], unit length
===========  ==================================================================

.. math:: e_l = \\mathrm{LN}(x_l u_l v_l) \\, P_{kind(l)}, \\qquad
          z = \\mathrm{head}(\\mathrm{LN}(h)), \\; h = \\mathrm{block}([s; e_1; e_2; ...])_0

with one pre-norm transformer block and a learned first token s. Only the product u v is seen, so
ranks may differ and (u G, G^-1 v) is the same adapter. Trained against embeddings of descriptions,

.. math:: L = \\tfrac12 \\bigl(\\mathrm{CE}(z t^T / \\theta) + \\mathrm{CE}(t z^T / \\theta)\\bigr),

the nearest adapters to a text are those to load. The gated fusion of what was retrieved is
`autolora_gate`.

Shapes: deltas {path: u [*stack, d_in, R], v [*stack, R, d_out]}; a bank by `jax.vmap`.

Paper: AutoLoRA 2025, arXiv:2508.02107.
Source: official code (DiffSynth-Studio) for the encoder, for the maths; the contrastive loss is
presumed, it is not in the code.
Deviates: each slice of a stacked site is a token of its own probes; sizes are arguments; gelu.
"""

import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora import algebra
from jlora.core.init import key_of
from jlora.core.site import Arrays, Site
from jlora.numerics import matmul
from jlora.system import System
from jlora.types import Dynamic, Tree


def kind_of(path: str) -> str:
    """The kind of a site: its path without numbers.

    Args:
      path: "layers/3/attention/query".

    Returns:
      "layers/#/attention/query".
    """
    return re.sub(r"\d+", "#", path)


def init_encoder(
    key: PRNGKeyArray,
    sites: Sequence[Site],
    *,
    out: int,
    width: int = 64,
    probes: int = 1,
    kind: Callable[[str], str] = kind_of,
) -> dict[str, Dynamic]:
    """Parameters of the encoder.

    Args:
      key: of the initial values.
      sites: of the adapters that are to be encoded.
      out: size of an embedding.
      width: of the transformer block; 64.
      probes: per site, P; 1, as in the official code.
      kind: the kind of a path; sites of one kind share a projection.

    Returns:
      A dictionary of arrays.

    Raises:
      ValueError: sites of one kind with different d_out.
    """
    kinds: dict[str, int] = {}
    for site in sites:
        if kinds.setdefault(kind(site.path), site.d_out) != site.d_out:
            raise ValueError(
                f"{site.path}: got d_out {site.d_out}, expected {kinds[kind(site.path)]} "
                f"as of the kind {kind(site.path)!r}"
            )

    def normal(name: str, *shape: int) -> Array:
        return jax.random.normal(key_of(key, name), shape) / math.sqrt(shape[-2])

    return {
        "probes": {s.path: normal(s.path, *s.stack, probes, s.d_in) for s in sites},
        "project": {k: normal(f"project {k}", d, width) for k, d in kinds.items()},
        "special": normal("special", 1, width),
        "qkv": normal("qkv", width, 3 * width),
        "mix": normal("mix", width, width),
        "up": normal("up", width, 2 * width),
        "down": normal("down", 2 * width, width),
        "head": normal("head", width, out),
    }


def tokens(
    params: dict[str, Tree], adapter: Dynamic, kind: Callable[[str], str] = kind_of
) -> Array:
    """The tokens of an adapter, in the order of sorted paths.

    Raises KeyError for a site that the encoder does not know.

    Args:
      params: of `init_encoder`.
      adapter: an adapter, or its deltas.
      kind: as for `init_encoder`.

    Returns:
      [T, width].
    """
    deltas, rows = algebra.deltas(adapter), []
    for path in sorted(deltas):
        u, v = algebra.low_rank(deltas[path])
        seen = matmul(matmul(params["probes"][path].astype(u.dtype), u), v)
        rows.append(matmul(_norm(seen), params["project"][kind(path)]).reshape(-1, _width(params)))
    return jnp.concatenate(rows)


def encode(
    params: dict[str, Tree],
    adapter: Dynamic,
    *,
    heads: int = 4,
    kind: Callable[[str], str] = kind_of,
) -> Array:
    """The embedding of an adapter.

    Args:
      params: of `init_encoder`.
      adapter: an adapter, or its deltas.
      heads: of the attention, a divisor of the width; 4.
      kind: as for `init_encoder`.

    Returns:
      [out], of unit length.

    Raises:
      ValueError: heads that do not divide the width.
    """
    width = _width(params)
    if width % heads:
        raise ValueError(f"heads: got {heads}, expected a divisor of the width {width}")
    x = jnp.concatenate([params["special"], tokens(params, adapter, kind)])
    q, k, v = jnp.split(matmul(_norm(x), params["qkv"]), 3, axis=-1)
    q, k, v = (t.reshape(-1, heads, width // heads).swapaxes(0, 1) for t in (q, k, v))
    scores = jax.nn.softmax(matmul(q, k.mT) / math.sqrt(width // heads), axis=-1)
    x = x + matmul(matmul(scores, v).swapaxes(0, 1).reshape(-1, width), params["mix"])
    x = x + matmul(jax.nn.gelu(matmul(_norm(x), params["up"])), params["down"])
    return _unit(matmul(_norm(x[:1]), params["head"]))[0]


def contrastive(
    z: Float[Array, "n out"], t: Float[Array, "n out"], *, temperature: float = 0.07
) -> Array:
    """InfoNCE between adapters and their descriptions.

    Args:
      z: embeddings of adapters.
      t: of their texts, of any length.
      temperature: theta; 0.07, as in CLIP.

    Returns:
      [].
    """
    logits = matmul(z, _unit(t).mT) / temperature
    both = [jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=a))) for a in (0, 1)]
    return -(both[0] + both[1]) / 2


def retrieve(z: Float[Array, "n out"], query: Float[Array, "out"], k: int) -> tuple[Array, Array]:
    """The adapters nearest to a text.

    Args:
      z: embeddings of adapters.
      query: of the text.
      k: how many, 1..N.

    Returns:
      Indices [k] and cosines [k], nearest first.

    Raises:
      ValueError: k out of range.
    """
    if not 1 <= k <= z.shape[0]:
        raise ValueError(f"k: got {k}, expected in 1..{z.shape[0]}")
    cosines, ids = jax.lax.top_k(matmul(z, _unit(query[None]).mT)[:, 0], k)
    return ids, cosines


def _width(params: Arrays) -> int:
    return params["mix"].shape[0]


def _norm(x: Array) -> Array:
    """Layer norm without parameters; a zero row stays zero."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _unit(x: Array) -> Array:
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


SYSTEM = System(
    name="AutoLoRA: retrieval",
    paper="2025, 2508.02107",
    symbol="encode",
    evidence="tokens by numpy; no gauge; unseen adapters found by text; mutation check",
    rows=(6,),
    claim="autolora_retrieval",
)
