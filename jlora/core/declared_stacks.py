r"""Stack axes that a user declares: one leaf that is several matrices.

A function may use all slices of a leaf in one einsum, as Gemma does with keys and values
(``kv_einsum`` [2, heads, d_in, features]). By its use the first axis is one of outputs, and an
adapter has one A for all of them. Declared as a stack, each slice c gets factors of its own:

.. math:: W_c' = W_c + s A_c B_c

Reference: none; it is what an adapter of two torch modules has.
Deviates: nothing.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from jlora.core.site import Site


def with_stacks(sites: Iterable[Site], stacks: Mapping[str, int | Sequence[int]]) -> list[Site]:
    """The sites with the stack axes that patterns declare.

    Args:
      sites: as the function uses them.
      stacks: {regex on paths (`re.search`): axis or axes of the leaf, negative ones from the end}.

    Returns:
      The sites in their order, changed where a pattern matches.

    Raises:
      ValueError: a bad regex, a pattern without a site, or an axis that cannot be a stack.
    """
    rows = list(sites)
    for pattern, axes in stacks.items():
        try:
            matching = [k for k, site in enumerate(rows) if re.search(pattern, site.path)]
        except re.error as e:
            raise ValueError(f"stacks: {pattern!r} is not a regular expression: {e}") from e
        if not matching:
            near = difflib.get_close_matches(pattern, [s.path for s in rows], n=5, cutoff=0.0)
            raise ValueError(f"stacks: {pattern!r} matches no site; nearest: {near}")
        for k in matching:
            rows[k] = _stacked(rows[k], [axes] if isinstance(axes, int) else axes)
    return rows


def _stacked(site: Site, axes: Sequence[int]) -> Site:
    """`site` with some axes of its leaf as stacks."""
    kinds, n = list(site.kinds), len(site.shape)
    said = f"stacks: {site.path} {site.shape} with axes {site.kinds!r} (s stack, i in, o out): "
    for axis in axes:
        if not isinstance(axis, int) or not -n <= axis < n:
            raise ValueError(said + f"got axis {axis!r}, expected one of {n} by its number")
        if kinds[axis] == "i":
            raise ValueError(said + f"got axis {axis}, which is summed over; expected outputs")
        kinds[axis] = "s"
    if "i" in kinds and "o" not in kinds:
        raise ValueError(said + f"got axes {list(axes)}, expected outputs to be left")
    return dataclasses.replace(site, kinds="".join(kinds))
