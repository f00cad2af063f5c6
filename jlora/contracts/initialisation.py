r"""Initialisations: the values that the arrays of a fresh adapter start training from.

============  ===========================================================================
W             a weight of the parameters, seen as [*stack, d_in, d_out]
W'            the same merged with the initialised adapter
x             a batch of inputs of a site, [*stack, n, d_in]
G             the gradient of the loss by W, summed over a batch, [*stack, d_in, d_out]
S             statistics: any PyTree that is gathered batch by batch
============  ===========================================================================

A system gives ``initialise(key, adapter, params, S) -> adapter`` and, where it needs data,
``start(adapter) -> S`` and ``gather(S, batch) -> S``, where a batch is x or G of every site by its
path. Data are streamed: no more than one batch is held. The function of the model stays what it is,

.. math:: \text{merge}(W, \text{initialise}(\phi)) = W

and a system that starts elsewhere says so: ``breaks={"identity": reason}``.

Laws, each a relative error, or infinite where the answer is no:

============  ===========================================================================
identity      W' is W
tree          paths, shapes, dtypes and sites of the adapter are what they were
base          the parameters are the same objects, with the same values
stream        the statistics of other batches of the same data, in another order, are the same
key           one key gives the same bits; another one too, unless the values are random
stacked       a stack of layers is initialised as each layer would be on its own
abstract      without values of W: an error that names the path, or (systems that do not read
              W) the same adapter
============  ===========================================================================
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora.contracts.distance import gap, same_bits
from jlora.core import init
from jlora.core.adapter import Adapter
from jlora.core.lift import flatten
from jlora.core.merge import delta
from jlora.core.method import Method
from jlora.core.site import Site, fold
from jlora.system import System
from jlora.types import Tree

LAWS = ("identity", "tree", "base", "stream", "key", "stacked", "abstract")
NEEDS = ("nothing", "inputs", "gradients")
NO = float("inf")

Params = Tree  # of weights
Statistics = Tree  # () of a system that needs no data
Batch = Mapping[str, Array]  # path -> x [*stack, n, d_in] or G [*stack, d_in, d_out]
Initialise = Callable[[Array, Adapter, Params, Statistics], Adapter]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initialisation(System):
    """The record of an initialisation.

    Attributes:
      method: the method whose adapters it initialises, of rank 2 or so.
      initialise: (key, fresh adapter, parameters, statistics) -> the adapter to train.
      needs: what the batches hold: "nothing", "inputs" or "gradients".
      start: adapter -> the statistics before the first batch.
      gather: (statistics, batch) -> the statistics with that batch.
      reads_weights: whether it needs the values of the parameters.
      random: whether the values depend on the key.
    """

    laws: ClassVar[tuple[str, ...]] = LAWS
    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/initialisation_test.py",)

    method: Method
    initialise: Initialise
    needs: str = "nothing"
    start: Callable[[Adapter], Statistics] = lambda adapter: ()
    gather: Callable[[Statistics, Batch], Statistics] = lambda statistics, batch: statistics
    reads_weights: bool = False
    random: bool = False

    def __post_init__(self):
        System.__post_init__(self)
        if self.needs not in NEEDS:
            raise ValueError(f"{self.name}: needs: got {self.needs!r}, expected one of {NEEDS}")


class World(NamedTuple):
    """What the laws are measured on."""

    params: Params  # {"layers": {"up": [2, 8, 6]}, "head": [5, 6], "bias": [5]}
    adapter: Adapter  # fresh, of the stacked layers/up and of head, which is stored transposed
    batches: tuple[Batch, ...]  # three, of different sizes; () of systems that need no data


def world(record: Initialisation, seed: int = 0) -> World:
    """Random weights of two stacked layers and a transposed head, with data where needed.

    Args:
      record: the system.
      seed: of the draws.

    Returns:
      The world.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"layers": {"up": draw(2, 8, 6)}, "head": draw(5, 6), "bias": draw(5)}
    dtype, ops = jnp.dtype("float32"), ("dot",)
    sites = (
        Site("layers/up", (2, 8, 6), "sio", dtype, ops),
        Site("head", (5, 6), "oi", dtype, ops),
    )
    grouped = [(dataclasses.replace(s, group="*0"), record.method) for s in sites]
    adapter = init.initialise(jax.random.key(seed), grouped, flatten(params)[0])
    size = {"inputs": lambda n, s: (n, s.d_in), "gradients": lambda n, s: (s.d_in, s.d_out)}
    batches = tuple(
        {s.path: draw(*s.stack, *size[record.needs](n, s)) for s in sites}
        for n in ((3, 5, 4) if record.needs != "nothing" else ())
    )
    return World(params, adapter, batches)


def error(law: str, record: Initialisation, at: World) -> float:
    """The error of a law.

    Args:
      law: one of `LAWS`.
      record: the system.
      at: what it is measured on.

    Returns:
      0 where the law holds.
    """
    return CHECKS[law](record, at)


def laws_of(record: Initialisation) -> tuple[str, ...]:
    """The laws that a system can be asked for: keys of a stack are not those of its layers.

    Args:
      record: the system.

    Returns:
      Names of `LAWS`; "stacked" of systems that are not random alone.
    """
    return tuple(law for law in LAWS if law != "stacked" or not record.random)


def gathered(record: Initialisation, adapter: Adapter, batches: Sequence[Batch]) -> Statistics:
    """The statistics of some batches, one after the other.

    Args:
      record: the system.
      adapter: a fresh adapter.
      batches: its data.

    Returns:
      What `record.gather` returns last.
    """
    statistics = record.start(adapter)
    for batch in batches:
        statistics = record.gather(statistics, batch)
    return statistics


def run(record: Initialisation, at: World, seed: int = 7, params: Params = None) -> Adapter:
    """The initialised adapter.

    Args:
      record: the system.
      at: the world.
      seed: of the key.
      params: instead of the world's; None: those.

    Returns:
      The adapter to train.
    """
    statistics = gathered(record, at.adapter, at.batches)
    params = at.params if params is None else params
    return record.initialise(jax.random.key(seed), at.adapter, params, statistics)


def identity(record: Initialisation, at: World) -> float:
    """The largest change of a weight, relative to the weight.

    Args and Returns are those of `error`.
    """
    adapter, leaves = run(record, at), flatten(at.params)[0]
    worst = 0.0
    for site, _ in adapter.sites:
        w = np.asarray(fold(leaves[site.path], site.kinds))
        worst = max(worst, gap(w + np.asarray(delta(at.params, adapter)[site.path]), w))
    return worst


def tree(record: Initialisation, at: World) -> float:
    """0, or infinity where a path, shape, dtype, site or method is another.

    Args and Returns are those of `error`.
    """
    after = run(record, at)
    if jax.tree.structure(after) != jax.tree.structure(at.adapter):
        return NO
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(at.adapter), strict=True)
    return 0.0 if all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs) else NO


def base(record: Initialisation, at: World) -> float:
    """0, or infinity where a parameter was replaced, changed or given away.

    Args and Returns are those of `error`.
    """
    given = jax.tree.map(lambda t: jnp.array(t), at.params)  # an array of its own: it may be lost
    before = jax.tree.leaves(given)
    run(record, at, params=given)
    after = jax.tree.leaves(given)
    same = len(before) == len(after) and all(a is b for a, b in zip(after, before, strict=True))
    if not same or any(t.is_deleted() for t in before):
        return NO
    return gap(given, at.params)


def stream(record: Initialisation, at: World) -> float:
    """Statistics of the batches in reverse, and with the first two as one, against the batches'.

    Args and Returns are those of `error`.
    """
    if not at.batches:
        return 0.0
    first, second, *rest = at.batches
    if record.needs == "inputs":
        joined = {p: jnp.concatenate([first[p], second[p]], axis=-2) for p in first}
    else:
        joined = {p: first[p] + second[p] for p in first}
    want = gathered(record, at.adapter, at.batches)
    others = (at.batches[::-1], (joined, *rest))
    return max(gap(gathered(record, at.adapter, other), want) for other in others)


def key(record: Initialisation, at: World) -> float:
    """0, or infinity where the bits differ.

    Args and Returns are those of `error`.
    """
    again = run(record, at) if record.random else run(record, at, seed=8)
    first, twice = run(record, at), run(record, at)
    return 0.0 if same_bits(first, twice) and same_bits(first, again) else NO


def stacked(record: Initialisation, at: World) -> float:
    """Against a world in which both layers are sites of their own.

    Args and Returns are those of `error`.
    """
    layers = range(2)
    params = {**at.params, "layers": [{"up": at.params["layers"]["up"][k]} for k in layers]}

    def apart(by_path: Mapping[str, Tree]) -> dict[str, Tree]:
        one = lambda k: jax.tree.map(lambda t: t[k], by_path["layers/up"])  # noqa: E731
        rest = {p: v for p, v in by_path.items() if p != "layers/up"}
        return {**rest, **{f"layers/{k}/up": one(k) for k in layers if "layers/up" in by_path}}

    def unstacked(adapter: Adapter) -> Adapter:
        sites = []
        for site, method in adapter.sites:
            paths = [f"layers/{k}/up" for k in layers] if site.stack else [site.path]
            sites += [(dataclasses.replace(site.slice(), path=p), method) for p in paths]
        return Adapter(apart(adapter.trainable), apart(adapter.frozen), tuple(sites))

    flat = World(params, unstacked(at.adapter), tuple(apart(b) for b in at.batches))
    got, want = unstacked(run(record, at)), run(record, flat)
    return gap((got.trainable, got.frozen), (want.trainable, want.frozen))


def abstract(record: Initialisation, at: World) -> float:
    """0, or infinity for a wrong answer to parameters without values.

    Args and Returns are those of `error`.
    """
    params = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), at.params)
    try:
        after = run(record, at, params=params)
    except ValueError as refusal:
        named = any(site.path in str(refusal) for site, _ in at.adapter.sites)
        return 0.0 if record.reads_weights and named else NO
    except Exception:  # whatever JAX says of an array that is none
        return NO
    return NO if record.reads_weights or not same_bits(after, run(record, at)) else 0.0


CHECKS: Mapping[str, Callable[[Initialisation, World], float]] = {
    "identity": identity,
    "tree": tree,
    "base": base,
    "stream": stream,
    "key": key,
    "stacked": stacked,
    "abstract": abstract,
}
