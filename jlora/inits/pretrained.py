r"""PVP: adapters that are trained on much data start those that have only a few examples.

=================  =======================================================================
W                  the frozen weights, the same in both stages
:math:`\phi_1`     the adapter that the first stage has trained, on a large set
:math:`\phi`       the adapter of the second stage, on few examples
=================  =======================================================================

.. math::
    \phi_1 = \arg\min_\phi L_{\text{large}}(W, \phi), \qquad
    \phi^{(0)}_i = \begin{cases} \phi_{1, i} & i \text{ is a site of } \phi_1 \\
    \text{fresh} & \text{else (a new head)} \end{cases}

The first stage is training as ever. `pretrained` makes the start of the second: sites of the first
adapter begin where it ended, all others are fresh, so that the function at the start is that of
the first stage, not of the base. `jl.inits.from_adapter(..., residual=True)` keeps the base's.

Song et al., `PVP: Pre-trained Visual Parameter-Efficient Tuning
<https://arxiv.org/abs/2304.13639>`_, 2023.

Paper: Song et al. 2023, arXiv:2304.13639 (no code was published).
Source: abstract.
Deviates: nothing that is known; the paper's sets and rates are not.
"""

import jax

from jlora.contracts.initialisation import Initialisation
from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.site import Arrays
from jlora.methods.low_rank.lora import LoRA


def pretrained(adapter: Adapter, source: Adapter) -> Adapter:
    """An adapter that starts where another one ended, at the sites that both have.

    Args:
      adapter: fresh, of the second stage.
      source: of the first stage, for weights of the same shapes; every site of it is used.

    Returns:
      `adapter` with the arrays and methods of `source`, whose alphas may be others.

    Raises:
      ValueError: a bank, a source without sites or with one that `adapter` lacks, another method,
        layout, shape or dtype of a site; shared tensors that a fresh site would need as well.
    """
    one_adapter(adapter, "pretrained")
    one_adapter(source, "pretrained: source")
    given = {site.path: (site, method) for site, method in source.sites}
    lacking = sorted(given.keys() - {site.path for site, _ in adapter.sites})
    if lacking or not given:
        raise ValueError(f"pretrained: source has the sites {sorted(given)[:4]}, expected some of "
                         f"{[site.path for site, _ in adapter.sites][:4]}")  # fmt: skip
    trainable, frozen, rows = dict(adapter.trainable), dict(adapter.frozen), []
    for site, method in adapter.sites:
        if site.path not in given:
            rows.append((site, method))
            continue
        other, known = given[site.path]
        if known != method or (other.shape, other.kinds) != (site.shape, site.kinds):
            raise ValueError(
                f"{site.path}: pretrained: source has {known} of {other.shape} {other.kinds!r}, "
                f"expected {method} of {site.shape} {site.kinds!r}"
            )
        if bool(other.group) != bool(site.group):
            raise ValueError(f"{site.path}: pretrained: shared tensors in one adapter only")
        for path, theirs in dict.fromkeys([(site.path, other.path), (site.group, other.group)]):
            if not path:
                continue
            for mine, parts in ((trainable, source.trainable), (frozen, source.frozen)):
                mine[path] = _checked(path, mine.get(path, {}), parts.get(theirs, {}))
        rows.append((site, known))
    shared = {site.group for site, _ in adapter.sites if site.path in given} - {""}
    alone = [s.path for s, _ in adapter.sites if s.group in shared and s.path not in given]
    if alone:
        raise ValueError(f"{alone[0]}: pretrained: is fresh, but shares tensors with sites of the "
                         "source; give it a pattern of its own")  # fmt: skip
    return adapter.replace(trainable=trainable, frozen=frozen, sites=tuple(rows))


def _checked(path: str, own: Arrays, new: Arrays) -> Arrays:
    """`new`, where its arrays are of the form of `own`; raises ValueError else."""
    forms = [{k: f"{t.dtype}{list(t.shape)}" for k, t in p.items()} for p in (new, own)]
    if forms[0] != forms[1]:
        raise ValueError(f"{path}: pretrained: source has {forms[0]}, expected {forms[1]}")
    return dict(new)


def _moved(adapter: Adapter) -> Adapter:
    """An adapter as if it had been trained, for the laws."""
    return adapter.replace(trainable=jax.tree.map(lambda t: t + 0.1, adapter.trainable))


SYSTEM = Initialisation(
    name="PVP",
    paper="Song 2023, 2304.13639",
    symbol="pretrained",
    evidence="two stages on a frozen base: the start is the first stage's function, a new head's "
    "site is fresh, and fewer steps reach a related task",
    kind="recipe",
    rows=(25,),
    claim="pvp",
    method=LoRA(rank=2),
    initialise=lambda key, adapter, params, statistics: pretrained(adapter, _moved(adapter)),
    breaks={"identity": "it starts where the first stage ended, not at the base"},
)
