"""The laws of parameters: any container holds them, and every size may be one.

What holds the parameters must not matter: the traced programs of a model with a dict, and of the
same model with a custom node of a list that holds a NamedTuple, or with a single array, are the
same text. So nothing is compiled for it.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.contract.case import Case, block, close, projected, scanned
from jlora.core.adapter import Adapter
from jlora.core.block import BlockMethod
from jlora.core.sites import init
from jlora.types import Dynamic, Tree


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Module:
    """A node of a user's own, whose children have no names."""

    parts: list  # the only child: head [8, 8], and the layers by name in a NamedTuple

    def tree_flatten(self) -> tuple[tuple[list], None]:
        """The node as JAX sees it.

        Returns:
          (children, None): nothing but the children is known of it.
        """
        return (self.parts,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[list]) -> "Module":
        """The node of its children.

        Args:
          children: the parts alone.

        Returns:
          The node.
        """
        return cls(*children)


def containers(case: Case) -> None:
    """lists, NamedTuples, nodes of one's own and a single array hold parameters as a dict does

    Args:
      case: a method on the small model.
    """
    layers = collections.namedtuple("Layers", sorted(case.params["layers"]))

    def wrapped(params: Tree) -> Module:
        return Module([params["head"], layers(**params["layers"])])

    def model(module: Module, x: Float[Array, "b t d"]) -> jax.Array:
        head, named = module.parts
        return scanned({"layers": named._asdict(), "head": head}, x)

    start = functools.partial(init, jax.random.key(0))
    methods = {case.pattern.replace("layers", "0/1"): case.method}
    fresh = jax.eval_shape(
        lambda p, x: start(model, p, x, methods=methods), wrapped(case.params), case.x
    )
    _same_program(case, case.noisy[0], (scanned, case.params), (model, wrapped(case.params), fresh))
    if type(case.method).vectors or isinstance(case.method, BlockMethod):
        return  # no product of one array: a vector's is none, a block has several sites

    def single(w: Float[Array, "2 d_in d_out"], x: Float[Array, "b t d_in"]) -> jax.Array:
        return projected({"up": w}, x)

    array, methods = case.params["layers"]["up"], {"": case.method}
    fresh, named = (
        jax.eval_shape(lambda p, x: start(f, p, x, methods=methods), p, case.x)  # noqa: B023
        for f, p in ((single, array), (projected, {"up": array}))
    )
    ((site, _),) = fresh.sites
    assert site.path == "", site.path
    shapes = jax.tree.map(lambda t: jnp.ones(t.shape, t.dtype), named)
    _same_program(case, shapes, (projected, {"up": array}), (single, array, fresh))


def _moved(adapter: Adapter, other: Adapter) -> Adapter:
    """The arrays of `adapter` at the sites of `other`, which are the same in the same order."""
    rows = list(zip(adapter.sites, other.sites, strict=True))
    places = {s.group: t.group for (s, _), (t, _) in rows} | {
        s.path: t.path for (s, _), (t, _) in rows
    }

    def moved(part: Tree) -> Tree:
        return {places[path]: arrays for path, arrays in part.items()}

    same = other.replace(trainable=moved(adapter.trainable), frozen=moved(adapter.frozen))
    have, want = (
        jax.tree.map(lambda t: (t.shape, str(t.dtype)), (a.trainable, a.frozen))
        for a in (same, other)
    )
    assert have == want, f"arrays differ: {have}, {want}"
    return same


def _same_program(
    case: Case, adapter: Adapter, named: tuple[Dynamic, Tree], other: tuple[Dynamic, Tree, Adapter]
) -> None:
    """Lifted and merged, (model, parameters) and (model, parameters, sites) trace to one text."""
    merges = case.merges  # known before anything is traced

    def run(model: Dynamic, params: Tree, adapter: Adapter) -> Dynamic:
        merged = case.merge(params, adapter) if merges else ()
        return case.lift(model)(params, adapter, case.x, ctx=case.ctx), merged

    model, params, sites = other
    moved = lambda params, adapter: run(model, params, _moved(adapter, sites))  # noqa: E731
    texts = [
        str(jax.make_jaxpr(f)(p, adapter))
        for f, p in ((functools.partial(run, named[0]), named[1]), (moved, params))
    ]
    assert texts[0] == texts[1], "another container of the parameters is another program"


def ones(case: Case) -> None:
    """a stack of one layer and a batch of one row of one token are no exception

    Lifted and merged agree there in value and gradient; without a merged weight, lifted and
    unrolled.

    Args:
      case: a method on the small model.
    """
    first = lambda t: t[:1]  # noqa: E731
    params = {**case.params, "layers": jax.tree.map(first, case.params["layers"])}
    x, target, ctx = jax.tree.map(lambda t: t[:1, :1], (case.x, case.target, case.ctx))
    whole, methods, merges = case.noisy[0], {case.pattern: case.method}, case.merges
    start = functools.partial(init, jax.random.key(0), methods=methods)
    sites = jax.eval_shape(lambda p, x: start(scanned, p, x), params, x).sites
    stacked = {site.path for site, _ in sites}  # what sites share has no axis of layers

    def cut(part: Tree) -> Tree:
        return {k: jax.tree.map(first, v) if k in stacked else v for k, v in part.items()}

    adapter = Adapter(cut(whole.trainable), cut(whole.frozen), sites)

    def definition(adapter: Adapter) -> jax.Array:
        if merges:
            return scanned(case.merge(params, adapter), x)
        return case.lift(one_layer)(params, adapter, x, ctx=ctx)

    def run(adapter: Adapter) -> list[Tree]:
        def loss(trainable: Tree, output: Callable) -> tuple[jax.Array, jax.Array]:
            y = output(adapter.replace(trainable=trainable))
            return jnp.mean((y - target) ** 2), y

        lifted = lambda a: case.lift(scanned)(params, a, x, ctx=ctx)  # noqa: E731
        both = jax.value_and_grad(loss, has_aux=True)
        return [both(adapter.trainable, output) for output in (lifted, definition)]

    close(*case.jit(run)(adapter))


def one_layer(params: Tree, x: Float[Array, "b t d"]) -> jax.Array:
    """The model of one layer without scan.

    Args and Returns are those of `scanned`.
    """
    return block(x, {name: w[0] for name, w in params["layers"].items()}) @ params["head"]
