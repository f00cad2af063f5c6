r"""What every initialisation is made of: a fresh adapter, and a rule that fills it site by site.

=========  =======================================================================
W          the weight of a site, one matrix [d_in, d_out]
s          the adapter's own `scale`, which stays what it is
p          the arrays of the method (`a`, `b`, ...) at that matrix
p0         their frozen copies where the method is a `Residual`
=========  =======================================================================

.. math:: p = p_0 = \text{rule}(W, s, \ldots), \qquad W' = (W - \Delta(p_0)) + \Delta(p)

`filled` runs a rule over sites and stacks, one site at a time; `from_factors` and `from_matrices`
take the values from somewhere else.

Paper: Meng, Wang and Zhang 2024, PiSSA, arXiv:2404.02948 (what is subtracted).
Source: paper.
Deviates: nothing.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core import compat
from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.init import initialise, key_of
from jlora.core.lift import check, flatten, is_array
from jlora.core.method import Method
from jlora.core.site import Arrays, Site, fold
from jlora.core.sites import sites
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.low_rank.lora_xs import LoRAXS
from jlora.methods.wrappers.residual import Residual
from jlora.types import Batch, Dynamic, Tree

Rule = Callable[..., Arrays]  # (key, w or None, scale [], statistic, rank=r) -> arrays of a matrix
Methods = Mapping[str, Method | None]


def fresh(
    fn: Callable,
    params: Tree,
    batches: Iterable[Batch],
    methods: Methods,
    change: Callable[[LoRA], Method],
    key: PRNGKeyArray | None = None,
) -> tuple[Adapter, Iterable[Batch]]:
    """An adapter of the selected sites, to be filled.

    Args:
      fn: (params, *batch) -> anything; a batch that is no tuple is one argument.
      params: the parameters, possibly abstract.
      batches: of which the first one shows the shapes.
      methods: {regex on paths, or "all-linear": LoRA or None}, as `jl.init` takes it.
      change: LoRA -> the method that the sites get.
      key: of random values; None where all of them are replaced.

    Returns:
      The adapter, and the batches from the first one on.

    Raises:
      ValueError: no batches, a method other than LoRA, and as `jl.init`.
    """
    for pattern, method in methods.items():
        if method is not None and type(method) is not LoRA:
            raise ValueError(f"methods[{pattern!r}]: got {method}, expected LoRA")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches: got {type(batches).__name__}, expected an iterable")
    rest: Iterable[Batch] = batches
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("batches: got none, expected at least one")
    if iter(batches) is batches:
        rest = itertools.chain([first], batches)
    arguments = first if isinstance(first, tuple) else (first,)
    chosen = sites(fn, params, *arguments).select(methods)
    rows = [(site, change(method)) for site, method in chosen if isinstance(method, LoRA)]
    key = jax.random.key(0) if key is None else key
    return initialise(key, rows, flatten(params)[0]), rest


def filled(
    adapter: Adapter,
    params: Tree,
    rule: Rule,
    *,
    name: str,
    key: PRNGKeyArray | None = None,
    statistics: Mapping[str, Dynamic] | None = None,
    reads_weights: bool = True,
    times: int = 1,
) -> Adapter:
    """The adapter with the arrays that a rule gives for every matrix of every site.

    Args:
      adapter: one adapter.
      params: the weights that it belongs to; they are read and left alone.
      rule: (key, w [d_in, d_out], scale [], statistic, rank=r) -> arrays of that matrix by name;
        w is None where weights are not read.
      name: of the initialisation, in errors.
      key: of random values, folded per site and split over a stack; None: the rule has none.
      statistics: path -> arrays [*stack, ...]; None: there are none.
      reads_weights: whether the rule gets the weights.
      times: how many directions it takes per rank.

    Returns:
      An adapter of the same sites, shapes, dtypes and scales.

    Raises:
      ValueError: a bank, a site that is not in `params`, an abstract weight or one that is not
        finite, a rank above min(d_in, d_out) / times, arrays of another shape than the adapter's.
    """
    one_adapter(adapter, name)
    leaves, _ = flatten(params)
    check({path: w for path, w in leaves.items() if is_array(w)}, adapter)
    trainable, frozen = dict(adapter.trainable), dict(adapter.frozen)
    for site, _ in adapter.sites:
        rank = adapter.arrays(site)[0]["a"].shape[-1]
        check_rank(site, rank, name, times)
        w = matrices(site, leaves[site.path]) if reads_weights else None
        statistic = None if statistics is None else statistics[site.path]
        new = _of_site(adapter, site, w, functools.partial(rule, rank=rank), key, statistic)
        trainable[site.path], frozen[site.path] = _placed(adapter, site, new)
    return adapter.replace(trainable=trainable, frozen=frozen)


def from_factors(
    adapter: Adapter, factors: Callable[[Site], Dynamic] | Mapping[str, Dynamic]
) -> Adapter:
    """An adapter that starts from given factors; of a `Residual`, they are subtracted as well.

    Args:
      adapter: of LoRA, or of LoRA in a `Residual`; made from concrete or abstract parameters.
      factors: path -> (a [*stack, d_in, r], b [*stack, r, d_out]), or a function of the site that
        makes them, called for one site at a time.

    Returns:
      The adapter with these factors and its own scales.

    Raises:
      ValueError: a bank, a path that is missing, factors of another shape.
    """
    one_adapter(adapter, "from_factors")
    trainable, frozen = dict(adapter.trainable), dict(adapter.frozen)
    for site, _ in adapter.sites:
        if isinstance(factors, Mapping) and site.path not in factors:
            raise ValueError(f"{site.path}: got no factors, expected those of {sorted(factors)}")
        a, b = factors[site.path] if isinstance(factors, Mapping) else factors(site)
        trainable[site.path], frozen[site.path] = _placed(adapter, site, {"a": a, "b": b})
    return adapter.replace(trainable=trainable, frozen=frozen)


def from_matrices(adapter: Adapter, parts: Mapping[str, Sequence[Arrays]]) -> Adapter:
    """An adapter whose sites are set from arrays of one matrix after the other.

    Args:
      adapter: one adapter.
      parts: path -> arrays by name, one entry per matrix of the flattened stack.

    Returns:
      The adapter with these arrays.

    Raises:
      ValueError: arrays of another shape than the adapter's.
    """
    trainable, frozen = dict(adapter.trainable), dict(adapter.frozen)
    for site, _ in adapter.sites:
        whole = jax.tree.map(lambda *t: jnp.stack(t), *parts[site.path])
        new = {name: t.reshape(*site.stack, *t.shape[1:]) for name, t in whole.items()}
        trainable[site.path], frozen[site.path] = _placed(adapter, site, new)
    return adapter.replace(trainable=trainable, frozen=frozen)


def with_core(adapter: Adapter, change: Callable[[LoRAXS], Method] = lambda m: m) -> Adapter:
    """An adapter of LoRA as one of LoRA-XS: frozen a and b, a trained square matrix of zeros.

    Args:
      adapter: one adapter of LoRA.
      change: LoRAXS -> the method that the sites get, `Residual` or itself.

    Returns:
      An adapter to be filled.
    """
    trainable, frozen, rows = {}, {}, []
    for site, method in adapter.sites:
        assert isinstance(method, LoRA)
        p, new = adapter.arrays(site)[0], change(LoRAXS(rank=method.rank, alpha=method.alpha))
        core = jnp.zeros((*site.stack, method.rank, method.rank), p["a"].dtype)
        trainable[site.path], frozen[site.path] = {"core": core}, p
        if isinstance(new, Residual):
            frozen[site.path] = {**p, "core0": core}
        rows.append((site, new))
    return Adapter(trainable, frozen, tuple(rows))


def matrices(site: Site, w: Dynamic) -> Array:
    """The weight of a site as matrices, checked.

    Args:
      site: the site.
      w: its leaf; may be quantised.

    Returns:
      [*stack, d_in, d_out] in at least float32.

    Raises:
      ValueError: an abstract weight, or one that is not finite.
    """
    w = w.dequantize() if hasattr(w, "dequantize") else w
    if isinstance(w, jax.ShapeDtypeStruct):
        raise ValueError(f"{site.path}: got an abstract weight, expected one with values")
    if not compat.is_traced(w) and not bool(jnp.all(jnp.isfinite(w))):
        raise ValueError(f"{site.path}: got a weight with values that are not finite")
    return fold(w, site.kinds).astype(site.param_dtype)


def check_rank(site: Site, rank: int, name: str, times: int = 1) -> None:
    """Raises ValueError where a weight has fewer directions than are asked for.

    Args:
      site: of the weight.
      rank: of the adapter.
      name: of the initialisation.
      times: how many directions it takes per rank.

    Raises:
      ValueError: rank is above min(d_in, d_out) / times.
    """
    limit = min(site.d_in, site.d_out) // times
    if not 1 <= rank <= limit:
        raise ValueError(f"{site.path}: {name} rank expected in 1..{limit}, got {rank}")


def leading_factors(
    u: Float[Array, "d_in k"], s: Float[Array, " k"], vt: Float[Array, "k d_out"], scale: Dynamic
) -> Arrays:
    """Balanced factors of singular directions.

    Args:
      u: left ones.
      s: singular values.
      vt: right ones.
      scale: what the product is multiplied with.

    Returns:
      a = u sqrt(s / scale), b = sqrt(s / scale) vt.
    """
    root = jnp.sqrt(s / scale)
    return {"a": u * root[None, :], "b": root[:, None] * vt}


def _of_site(adapter, site, w, rule, key, statistic) -> Arrays:
    """The arrays that the rule gives, [*stack, ...]."""
    n, lead = math.prod(site.stack), len(site.stack)
    scale = adapter.frozen[site.path]["scale"].astype(site.param_dtype)
    own = None if key is None else key_of(key, site.path)
    if not lead:
        return rule(own, w, scale, statistic)
    flat = jax.tree.map(lambda t: t.reshape(n, *t.shape[lead:]), (w, scale, statistic))
    keys = None if own is None else jax.random.split(own, n)
    leaves = jax.vmap(rule)(keys, *flat)
    return jax.tree.map(lambda t: t.reshape(*site.stack, *t.shape[1:]), leaves)


def _placed(adapter: Adapter, site: Site, new: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
    """(trainable, frozen) of a site with new arrays, and with copies where there were copies."""
    parts = dict(adapter.trainable[site.path]), dict(adapter.frozen[site.path])
    for name, t in new.items():
        for part in parts:
            for key in (name, f"{name}0"):
                if key not in part:
                    continue
                if part[key].shape != t.shape:
                    got = f"got shape {t.shape}, expected {part[key].shape}"
                    raise ValueError(f"{site.path}/{key}: {got}")
                part[key] = jnp.asarray(t).astype(part[key].dtype)
    return parts
