r"""PCA codec: each token in its own principal basis, latents whitened to unit scale.

For token t with the centred training matrix X_t [n, D] = U S V^T:

.. math:: z_t = \Lambda_t^{-1} V_{t,1:L}^T (x_t - m_t), \qquad
    \hat x_t = m_t + V_{t,1:L} \Lambda_t z_t, \qquad
    \lambda_{ti} = \max(s_{ti}, \text{floor} \cdot s_{t1}) / \sqrt n .

Latents of the training set have mean 0 and mean square 1. With L = n - 1 it is lossless on the
training set. `joint=True` takes all tokens as one vector of T D numbers with one basis; its L
components are cut into a sequence of `length` latents for the denoiser. `whiten=False` gives all
components of a token one scale (root mean square), so that squared errors of latents are squared
errors of weights.

Symbols: X `x`, L `components`, V `basis`, m `mean`, lambda `scale`.

Source: textbook PCA; the zoo is small (n << D), so it keeps all there is to keep.
Deviates: nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora import numerics
from jlora.generation.tokens.normalise import check_finite
from jlora.system import System

_PRECISE = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class PCAConfig:
    """Hyper-parameters."""

    components: int = 64  # L of each token; with joint=True of all tokens together
    joint: bool = False  # one basis over all tokens
    length: int = 1  # latents in the sequence with joint=True; divides `components`
    whiten: bool = True  # every component unit scale; False: one scale per token
    floor: float = 1e-3  # smallest scale of a component relative to the first
    solver: str = "svd"  # "svd", or "gram" (n x n eigenproblem: faster, drops what is < 3e-4)


class PCAState(NamedTuple):
    """Bases. G = T, L = components per token; joint: G = 1 over vectors of T D numbers."""

    mean: Array  # [T, D]
    basis: Array  # [G, L, D or T D], orthonormal rows
    scale: Array  # [S, L'] scale of each latent number, S L' = G L


class PCAInfo(NamedTuple):
    """What the fit reports."""

    spectrum: Array  # [G, min(n, D)] singular values / sqrt(n)
    explained: Array  # [G] share of the energy in the kept components
    total: Array  # [] share of the energy of all tokens in the kept components


def init(key: PRNGKeyArray, config: PCAConfig, length: int, dim: int) -> PCAState:
    """An unfitted codec; also the template to restore one into.

    Args:
      key: unused; the protocol of codecs has it.
      config: hyper-parameters.
      length: T, tokens of an adapter.
      dim: D, numbers of a token.

    Returns:
      The state, whose bases are zero.
    """
    del key
    groups, width = (1, length * dim) if config.joint else (length, dim)
    basis = jnp.zeros((groups, config.components, width))
    pieces = config.length if config.joint else length
    scale = jnp.ones((pieces, groups * config.components // pieces))
    return PCAState(jnp.zeros((length, dim)), basis, scale)


def fit(
    key: PRNGKeyArray,
    x: Float[Array, "n T D"],
    config: PCAConfig,
    *,
    view: object = None,
    callback: object = None,
    resume: object = None,
) -> tuple[PCAState, PCAInfo]:
    """Bases of training tokens.

    Args:
      key: unused, like `view`, `callback` and `resume`: the protocol of codecs has them.
      x: [n, T, D] normalised tokens of training adapters.
      config: hyper-parameters.
      view: unused.
      callback: unused.
      resume: unused.

    Returns:
      (state, info).

    Raises:
      ValueError: more components than min(n, D), a length that does not divide them, an unknown
        solver, or values that are not finite.
    """
    del key, view, callback, resume
    check_finite(x)
    n, length, dim = x.shape
    groups, width = (1, length * dim) if config.joint else (length, dim)
    kept = config.components
    if not 1 <= kept <= min(n, width):
        raise ValueError(f"components: got {kept}, expected 1 .. min(n, D) = {min(n, width)}")
    pieces = config.length if config.joint else length
    if config.joint and kept % config.length:
        raise ValueError(f"length {config.length} does not divide {kept} components")
    if config.solver not in ("svd", "gram"):
        raise ValueError(f"unknown solver {config.solver!r}, expected 'svd' or 'gram'")
    mean = jnp.mean(x, axis=0)
    centred = (x - mean[None]).reshape(n, groups, width).swapaxes(0, 1)  # [G, n, width]
    spectrum, basis = (_svd if config.solver == "svd" else _gram)(centred, kept)
    spectrum = spectrum / jnp.sqrt(jnp.asarray(n, x.dtype))
    energy = jnp.square(spectrum)
    scale = spectrum[:, :kept]
    if not config.whiten:
        flat = jnp.sqrt(jnp.mean(jnp.square(scale), axis=1, keepdims=True))
        scale = jnp.broadcast_to(flat, scale.shape)
    # A token that never varies has a spectrum of rounding errors, which must not become latents.
    size = jnp.linalg.norm(mean.reshape(groups, width), axis=1, keepdims=True)
    scale = jnp.maximum(scale, config.floor * scale[:, :1])
    scale = jnp.maximum(scale, 8 * jnp.finfo(x.dtype).eps * size)
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    share = jnp.sum(energy[:, :kept], 1), jnp.sum(energy, 1)
    explained = jnp.where(share[1] > 0, share[0] / share[1], jnp.ones_like(share[0]))
    total = jnp.sum(share[0]) / jnp.sum(share[1])
    state = PCAState(mean, basis, scale.reshape(pieces, -1))
    return state, PCAInfo(spectrum, explained, total)


def _svd(x: Array, kept: int) -> tuple[Array, Array]:
    _, s, vt = numerics.svd(x)
    return s, vt[:, :kept]


def _gram(x: Array, kept: int) -> tuple[Array, Array]:
    # Eigenvectors of X X^T mix the rows of X; a QR then makes the basis orthonormal to rounding.
    values, u = numerics.eigh(jnp.einsum("gnd,gmd->gnm", x, x, precision=_PRECISE))
    u = u[:, :, ::-1][:, :, :kept]
    rows = jnp.einsum("gnl,gnd->gld", u, x, precision=_PRECISE)
    q, _ = numerics.qr(rows.swapaxes(1, 2))
    s = jnp.sqrt(jnp.maximum(values[:, ::-1], jnp.zeros_like(values)))
    return s[:, : min(x.shape[1:])], q.swapaxes(1, 2)


def encode(state: PCAState, x: Float[Array, "T D"]) -> Float[Array, "S L"]:
    """Latents of one adapter.

    Args:
      state: of `fit`.
      x: its normalised tokens.

    Returns:
      [S, L], at about unit scale.
    """
    groups, _, width = state.basis.shape
    centred = (x - state.mean).reshape(groups, width)
    z = jnp.einsum("gd,gld->gl", centred, state.basis, precision=_PRECISE)
    return z.reshape(state.scale.shape) / state.scale


def decode(state: PCAState, z: Float[Array, "S L"]) -> Float[Array, "T D"]:
    """Tokens of one adapter, affine in the latents.

    Args:
      state: of `fit`.
      z: its latents.

    Returns:
      [T, D], normalised.
    """
    groups, kept, _ = state.basis.shape
    coordinates = (z * state.scale).reshape(groups, kept)
    x = jnp.einsum("gl,gld->gd", coordinates, state.basis, precision=_PRECISE)
    return x.reshape(state.mean.shape) + state.mean


SYSTEM = System(
    name="PCA codec",
    paper="textbook",
    symbol="fit",
    evidence="against scikit-learn; lossless at n - 1 components",
    kind="component",
)
