r"""Adapter weights as a sequence of tokens: one token per (site, stack index).

The trainable leaves of one site slice, flattened and joined in the order of their names, are one
token; tokens shorter than the longest are padded with zeros:

.. math:: x_t = [\mathrm{vec}(a_t);\ \mathrm{vec}(b_t);\ 0] \in R^D, \qquad t = 1 \dots T.

With LoRA on both factors a token holds r (d_in + d_out) numbers; where A is frozen and shared it is
no trainable leaf, so the token holds only the r d_out numbers of B. Tokens follow the sites sorted
by path, and within a site its stack indices in row-major order. Only reshapes, joins and slices
are used: `detokenise(spec, tokenise(spec, tree))` is the tree, bitwise.

Everything is written for one adapter; `jax.vmap(partial(tokenise, spec))` does a bank.

Original to jlora (one token per site as in Weight2Token, arXiv 2603.15990).
Deviates: factors enter whole; that paper splits them into one token per singular direction.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.core.adapter import Adapter
from jlora.types import Dynamic

Tree = Mapping[str, Mapping[str, Dynamic]]


@dataclasses.dataclass(frozen=True)
class Group:
    """The tokens of one site."""

    path: str  # site path, "layers/attention/query/kernel"
    stack: tuple[int, ...]  # sizes of the leading stack axes; () for an un-stacked site
    leaves: tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape of one slice), by name

    @property
    def count(self) -> int:
        """Number of tokens."""
        return math.prod(self.stack)

    @property
    def size(self) -> int:
        """Numbers in one token, without padding."""
        return sum(math.prod(shape) for _, shape in self.leaves)


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """Static layout of the tokens of an adapter: hashable, usable as a jit static argument."""

    groups: tuple[Group, ...]  # one per site, sorted by path
    dtype: str  # common dtype of all leaves

    @property
    def length(self) -> int:
        """T, the number of tokens."""
        return sum(group.count for group in self.groups)

    @property
    def dim(self) -> int:
        """D, the numbers in a token including padding."""
        return max(group.size for group in self.groups)

    @property
    def types(self) -> np.ndarray:
        """int32 [T]: the token type, that is the position of its site in `groups`."""
        return np.repeat(np.arange(len(self.groups)), [g.count for g in self.groups]).astype("i4")

    @property
    def layers(self) -> np.ndarray:
        """int32 [T]: the row-major stack index of a token within its site."""
        return np.concatenate([np.arange(g.count) for g in self.groups]).astype("i4")

    @property
    def mask(self) -> np.ndarray:
        """bool [T, D]: True where a token holds a weight, False where it is padding."""
        sizes = np.repeat([g.size for g in self.groups], [g.count for g in self.groups])
        return np.arange(self.dim)[None, :] < sizes[:, None]

    def names(self) -> tuple[str, ...]:
        """Readable names of the tokens.

        Returns:
          One per token: "path[2]", or "path" for an un-stacked site.
        """
        out = []
        for group in self.groups:
            for index in np.ndindex(*group.stack):
                out.append(group.path + "".join(f"[{i}]" for i in index))
        return tuple(out)


def from_tree(trainable: Tree, stack: Mapping[str, tuple[int, ...]] | None = None) -> TokenSpec:
    """Layout of a tree of one adapter's trainable leaves.

    Args:
      trainable: path -> name -> array (or anything with shape and dtype) [*stack, ...].
      stack: path -> sizes of the stack axes. Without it every leaf is taken for a stacked
        matrix, so the stack is all but its last two axes.

    Returns:
      The `TokenSpec`.

    Raises:
      ValueError: no leaves at all, leaves of one site that disagree on the stack axes, or leaves
        of different dtypes.
    """
    groups, dtypes = [], {}
    for path in sorted(trainable):
        leaves, stacks = [], {}
        for name in sorted(trainable[path]):
            shape = tuple(trainable[path][name].shape)
            depth = len(stack[path]) if stack is not None else len(shape) - 2
            if depth < 0:
                raise ValueError(f"{path}/{name}: expected a matrix [*stack, m, n], got {shape}")
            stacks[name] = shape[:depth]
            leaves.append((name, shape[depth:]))
            dtypes[f"{path}/{name}"] = str(jnp.dtype(trainable[path][name].dtype))
        if not leaves:
            continue
        expected = tuple(stack[path]) if stack is not None else stacks[leaves[0][0]]
        if any(length != expected for length in stacks.values()):
            raise ValueError(
                f"{path}: leading axes {stacks}, expected the stack {expected} for all"
            )
        groups.append(Group(path, expected, tuple(leaves)))
    if not groups:
        raise ValueError("no trainable leaves: nothing to make tokens of")
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"leaves must share one dtype, got {dtypes}")
    return TokenSpec(tuple(groups), next(iter(dtypes.values())))


def from_adapter(adapter: Adapter) -> TokenSpec:
    """Layout of a `jlora` Adapter: the stack axes are those its sites declare.

    Args:
      adapter: one Adapter (of a bank: `bank[0]`), with `trainable` and `sites`.

    Returns:
      The `TokenSpec`.

    Raises:
      ValueError: as `from_tree`; a bank fails here because its leaves have a leading axis more.
    """
    stack = {site.path: tuple(site.stack) for site, _ in adapter.sites}
    return from_tree(adapter.trainable, stack)


def tokenise(spec: TokenSpec, trainable: Tree) -> Float[Array, "T D"]:
    """Tokens of one adapter.

    Args:
      spec: layout.
      trainable: path -> name -> array [*stack, ...].

    Returns:
      [T, D] of the leaves' dtype, zeros in the padding.

    Raises:
      ValueError: a path or name missing or unexpected, or a leaf of another shape or dtype.
    """
    given = {path for path, leaves in trainable.items() if leaves}
    wanted = {group.path for group in spec.groups}
    if given != wanted:
        raise ValueError(f"sites: missing {wanted - given}, unexpected {given - wanted}")
    rows = []
    for group in spec.groups:
        site = trainable[group.path]
        if set(site) != {name for name, _ in group.leaves}:
            raise ValueError(f"{group.path}: leaves {sorted(site)}, expected {group.leaves}")
        parts = []
        for name, shape in group.leaves:
            leaf = jnp.asarray(site[name])
            if leaf.shape != group.stack + shape or str(leaf.dtype) != spec.dtype:
                raise ValueError(
                    f"{group.path}/{name}: got {leaf.dtype}{list(leaf.shape)}, "
                    f"expected {spec.dtype}{list(group.stack + shape)}"
                )
            parts.append(leaf.reshape(group.count, -1))
        row = jnp.concatenate(parts, axis=1)
        rows.append(jnp.pad(row, ((0, 0), (0, spec.dim - group.size))))
    return jnp.concatenate(rows, axis=0)


def detokenise(spec: TokenSpec, tokens: Float[Array, "T D"]) -> dict[str, dict[str, Array]]:
    """The trainable tree of tokens; what stands in the padding is not read.

    Args:
      spec: layout.
      tokens: [T, D] of any float dtype (cast to the leaves' dtype).

    Returns:
      path -> name -> array [*stack, ...].

    Raises:
      ValueError: another shape.
    """
    if tokens.shape != (spec.length, spec.dim):
        raise ValueError(f"tokens: got {tokens.shape}, expected {(spec.length, spec.dim)}")
    out, row = {}, 0
    for group in spec.groups:
        block, column, leaves = tokens[row : row + group.count], 0, {}
        for name, shape in group.leaves:
            size = math.prod(shape)
            leaf = block[:, column : column + size].reshape(group.stack + shape)
            leaves[name] = leaf.astype(spec.dtype)
            column += size
        out[group.path] = leaves
        row += group.count
    return out


def factors(
    spec: TokenSpec, tokens: Float[Array, "T D"], frozen: Tree | None = None
) -> tuple[tuple[Array, Array], ...]:
    """LoRA factors of tokens.

    Args:
      spec: layout; every site has leaves "b" and either a trainable or a frozen "a".
      tokens: [T, D].
      frozen: path -> name -> array [*stack, ...], asked for "a" where it is not trained.

    Returns:
      A pair (a [k, d_in, r], b [k, r, d_out]) per site of k stack slices.

    Raises:
      ValueError: a site without "a" or "b".
    """
    tree, out = detokenise(spec, tokens), []
    for group in spec.groups:
        leaves = dict((frozen or {}).get(group.path, {})) | tree[group.path]
        if not {"a", "b"} <= set(leaves):
            raise ValueError(f"{group.path}: needs factors a and b, got {sorted(leaves)}")
        a, b = (jnp.asarray(leaves[name]) for name in "ab")
        out.append(tuple(x.reshape((group.count, *x.shape[-2:])) for x in (a, b)))
    return tuple(out)
