r"""FRoD's basis: one for all layers of a role, by a joint decomposition of their weights.

=================  =======================================================================
:math:`W_l`        the weights of a role, one per layer l, [d_in, d_out]
Q, R               the QR factors of all :math:`W_l^T`, one below the other
:math:`Q_l`        the rows of Q that belong to layer l, [d_out, d_in]
V                  `v` [d_in, d_in], shared by the layers
:math:`\alpha`     `ridge`
=================  =======================================================================

.. math::
    T = \frac{1}{L} \sum_l (Q_l^T Q_l + \alpha 1)^{-1} = Z \Lambda Z^T, \qquad V = R^T Z, \qquad
    W_l = V \, \mathrm{diag}(\lambda_l) \, U_l

with rows of :math:`U_l` of length 1. Where all layers together have fewer outputs than inputs, V is
orthonormal: all right singular vectors of the stacked weights. Directions that the layers share
then stand at the same places of every diagonal. Of one layer T is a multiple of the identity, and
any Z will do: its basis stays that of `jl.init`. Z is no more determined in the directions in which
two layers are all there is and each lacks some (as many as d_in - d_out of either).

FRoD, AAAI 2026, `<https://doi.org/10.1609/aaai.v40i31.39813>`_.

Paper: AAAI 2026, 10.1609/aaai.v40i31.39813.
Source: peft 0.21.2, read for its behaviour (the paper's text was not to be had).
Deviates: in float64; a role is a path without its numbers (PEFT: the last names of the module).
Every layer keeps V, though it is one.
"""

import re
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jlora.contracts.initialisation import Initialisation
from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.lift import check, flatten, is_array
from jlora.core.site import Site
from jlora.inits.start import matrices
from jlora.methods.shared_basis.frod import FRoD, coordinates
from jlora.types import Tree


def joint_basis(
    weights: Iterable[Float[np.ndarray, "d_in d_out"]], ridge: float = 1e-3
) -> Float[np.ndarray, "d_in d_in"]:
    """The basis of the weights of a role.

    Args:
      weights: one per layer; of one d_in.
      ridge: keeps the inverses stable where layers are much alike.

    Returns:
      V, float64, signs of its columns as LAPACK gives them.
    """
    parts = [w.astype(np.float64).T for w in weights]
    stacked = np.concatenate(parts)
    if len(stacked) < stacked.shape[1]:
        return np.linalg.svd(stacked, full_matrices=True)[2].T
    q, r = np.linalg.qr(stacked)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    inverses = [np.linalg.inv(p.T @ p + ridge * np.eye(len(r))) for p in np.split(q, ends)]
    return r.T @ np.linalg.eigh(sum(inverses) / len(inverses))[1]


def role_of(site: Site) -> str:
    """The role of a site: its path without numbers.

    Args:
      site: any.

    Returns:
      Such as "layers_#/up".
    """
    return re.sub(r"\d+", "#", site.path)


def frod(
    adapter: Adapter,
    params: Tree,
    *,
    ridge: float = 1e-3,
    role: Callable[[Site], str] = role_of,
) -> Adapter:
    """An adapter of FRoD in one basis per role.

    Args:
      adapter: one fresh adapter, all of whose sites are of `FRoD`.
      params: the weights that it belongs to; they are read and left alone.
      ridge: of `joint_basis`.
      role: which sites share a basis; a stack of layers always does.

    Returns:
      An adapter of the same sites, shapes and dtypes that merges into the same weights. Sites of
      one layer whose role has no other keep the basis that they have.

    Raises:
      ValueError: a bank, a site of another method or that is not in `params`, an abstract weight or
        one that is not finite, sites of one role that have not the same inputs.
    """
    one_adapter(adapter, "frod")
    leaves, _ = flatten(params)
    check({path: w for path, w in leaves.items() if is_array(w)}, adapter)
    roles: dict[str, list[Site]] = {}
    for site, method in adapter.sites:
        if not isinstance(method, FRoD):
            raise ValueError(f"{site.path}: got the method {method}, expected FRoD")
        roles.setdefault(role(site), []).append(site)
    trainable, frozen = dict(adapter.trainable), dict(adapter.frozen)
    for name, sites in roles.items():
        if len({site.d_in for site in sites}) > 1:
            raise ValueError(f"frod: the role {name!r} has sites of {[s.d_in for s in sites]} "
                             "inputs, expected one number")  # fmt: skip
        weights = {site: _layers(site, leaves[site.path]) for site in sites}
        layers = [w for stack in weights.values() for w in stack]
        if len(layers) < 2:
            continue
        v = joint_basis(layers, ridge)
        for site, stack in weights.items():
            trainable[site.path], frozen[site.path] = _placed(adapter, site, v, stack)
    return adapter.replace(trainable=trainable, frozen=frozen)


def _layers(site: Site, leaf: Tree) -> np.ndarray:
    """The weight as matrices [n, d_in, d_out]."""
    return np.asarray(matrices(site, leaf)).reshape(-1, site.d_in, site.d_out)


def _placed(adapter: Adapter, site: Site, v: np.ndarray, stack: np.ndarray) -> tuple[dict, dict]:
    """(trainable, frozen) of a site in the basis."""
    v = v.astype(np.float32)
    try:
        parts = [coordinates(v, w) for w in stack]
    except ValueError as error:
        raise ValueError(f"{site.path}: {error}") from error
    own, kept = dict(adapter.trainable[site.path]), dict(adapter.frozen[site.path])
    new = {
        "lam0": np.stack([lam0 for lam0, _ in parts]),
        "u": np.stack([u for _, u in parts]),
        "v": np.broadcast_to(v, (len(parts), *v.shape)),
    }
    for name, t in new.items():
        kept[name] = jnp.asarray(t.reshape(kept[name].shape), kept[name].dtype)
    return {**own, "lam": kept["lam0"].astype(own["lam"].dtype)}, kept


SYSTEM = Initialisation(
    name="FRoD basis",
    paper="AAAI 2026, 10.1609/aaai.v40i31.39813",
    symbol="frod",
    evidence="PEFT's bases of its golden adapter up to signs; every layer is diagonal in them",
    kind="component",
    method=FRoD(rate=0.2),
    initialise=lambda key, adapter, params, statistics: frod(adapter, params),
    reads_weights=True,
)
