"""The table of a function's sites, and what the patterns of `jl.init` select from it.

Deviates: nothing.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping

import jax.numpy as jnp

from jlora.core.method import Method
from jlora.core.site import Site
from jlora.types import Dynamic

MATMULS = ("gather", "dot", "conv", "ragged_dot", "product")


@dataclasses.dataclass(frozen=True)
class Sites:
    """A table of sites; iterate over it, or print it."""

    rows: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Site:
        return next(s for s in self.rows if s.path == path)

    def __str__(self) -> str:
        cells = [
            (s.path, " ".join(s.kinds), str(s.shape), jnp.dtype(s.dtype).name, _uses(s))
            for s in self.rows
        ]
        width = [max((len(c[k]) for c in cells), default=0) for k in range(5)]
        lines = (
            "  ".join([c[k].ljust(width[k]) for k in range(5)] + [_flops(s.flops)]).rstrip()
            for c, s in zip(cells, self.rows, strict=True)
        )
        return "\n".join([*lines, *([_COST] if any(s.views for s in self.rows) else [])])

    def select(self, methods: Mapping[str, Method | None]) -> list[tuple[Site, Method]]:
        """The sites of each pattern, first match wins.

        Args:
          methods: {pattern: Method, or None to leave out what it matches}. A pattern is a regex
            searched in
            the path, or "all-linear": every weight that a matmul consumes. A method that needs a
            matrix
            chooses among the leaves that a matmul, convolution or lookup consumes.

        Returns:
          The chosen sites with their methods, sorted by path.

        Raises:
          ValueError: no patterns, a bad regex, a pattern without a site, integer codes of quantised
            weights, or weights that "all-linear" would have to leave out.
        """
        if isinstance(methods, Method):
            raise ValueError(
                f"methods: got {methods}, expected {{'all-linear': {methods}}} or such"
            )
        if not methods:
            raise ValueError("methods: got no patterns, expected {regex: Method}")
        chosen: dict[str, tuple[Site, Method | None]] = {}
        for number, (pattern, method) in enumerate(methods.items()):
            if not isinstance(method, Method | None):
                raise ValueError(f"methods[{pattern!r}]: got {method!r}, expected a Method or None")
            matching = [s for s in self.rows if _matches(pattern, s) and _suits(method, s)]
            new = [s for s in matching if s.path not in chosen]
            if pattern == "all-linear" and method is not None:
                self._check_none_left_out(new, chosen)
            if not new:
                raise ValueError(self._unmatched(pattern, method, matching))
            codes = [_seen(s) for s in new if holds_codes(s.dtype)] if method is not None else []
            if codes:
                raise ValueError(_CODES.format(pattern=pattern, leaves="\n  ".join(codes)))
            for s in new:
                chosen[s.path] = (dataclasses.replace(s, group=f"*{number}"), method)
        return [(s, m) for _, (s, m) in sorted(chosen.items()) if m is not None]

    def _check_none_left_out(self, new: list[Site], chosen: Mapping[str, Dynamic]) -> None:
        """Raises ValueError for weights that are linear in part, or that a call hides."""
        rest = [s for s in self.rows if s.path not in chosen and (s in new or hides_matmul(s))]
        out = [_seen(s) for s in rest if s.refused or s not in new]
        if out:
            raise ValueError(
                "the pattern 'all-linear' cannot adapt all weights:\n  " + "\n  ".join(out) + "\n"
                "leave each out by a pattern before it, {regex: None}, or give "
                "on_dense='merge' to init and lift where an operation needs the merged weight"
            )

    def _unmatched(self, pattern: str, method: Method | None, matching: list[Site]) -> str:
        head = f"the pattern {pattern!r} of {method} "
        if matching:
            return head + f"has no site left: earlier patterns took {[s.path for s in matching]}"
        saw = "\nthe function uses:\n  " + "\n  ".join(_seen(s) for s in self.rows[:40])
        saw += f"\n  and {len(self.rows) - 40} more" if len(self.rows) > 40 else ""
        saw = saw if self.rows else "; the function uses no floating array of params at all"
        unsuited = [f"{s.path} ({', '.join(s.ops)})" for s in self.rows if _matches(pattern, s)]
        if unsuited:
            return head + f"matches only leaves that no matmul consumes whole: {unsuited}" + saw
        paths = [s.path for s in self.rows if _suits(method, s)]
        plain = re.sub(r"[^\w/]+", "", pattern)
        near = sorted(paths, key=lambda p: -_likeness(plain, p))[:5]
        return head + f"matches no site; nearest: {near}" + saw


def _seen(s: Site) -> str:
    """What takes a leaf, and why it cannot be a site."""
    why = f"; needs the merged weight for {', '.join(s.refused)}" if s.refused else ""
    why += f"; holds {jnp.dtype(s.dtype).name} codes" if holds_codes(s.dtype) else ""
    if not why and any(op.endswith("of a part") for op in s.ops):
        why = "; one of its axes has two roles: repeated, or summed over here and kept there"
    return f"{s.path} {s.shape}: {_uses(s)}{why}"


_COST = (
    "(view): methods with factors (LoRA, LoKr, ...) run on what is in view; the others (DoRA, "
    "OFT, ...) merge the weight there, as all methods do under custom_jvp and custom_vjp"
)
_CODES = (
    "the pattern {pattern!r} matches integer codes of quantised weights, to which nothing can be "
    "added:\n  {leaves}\ngive the dequantised weights, or leaves with `dequantize()` as of "
    "jl.quantize, to the model that takes plain weights; or leave them out, {{regex: None}}"
)


def holds_codes(dtype: Dynamic) -> bool:
    """Whether a matrix of a dtype may be the codes of a quantised weight.

    Args:
      dtype: of the matrix.

    Returns:
      True for integers of at most 8 bits.
    """
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits <= 8


LOOPS = ("scan", "while", "cond")


CALLS = (  # what may multiply with a weight where the walk does not look
    *(*LOOPS, "custom_jvp_call", "custom_vjp_call", "shard_map", "pallas_call", "tpu_custom_call"),
    *("dot_general", "conv_general_dilated", "ragged_dot_general", "ffi_call", "scaled_dot"),
)


def hides_matmul(s: Site) -> bool:
    """Whether a leaf that no site stands for is a weight still: something linear takes it.

    Args:
      s: the row of the leaf.

    Returns:
      False where its inputs are known.
    """
    if "i" in s.kinds:
        return False
    return any(may_be_matmul(op, s.shape) for op in s.ops)


def may_be_matmul(op: str, shape: tuple[int, ...]) -> bool:
    """Whether an operation that no rule takes may be a matmul with a leaf, or hide one.

    Args:
      op: as in `Site.ops`.
      shape: of the leaf.

    Returns:
      False for vectors in a call.
    """
    if op.startswith(("dot ", "ragged_dot ")):  # after something, or of a part
        return True
    return op.split(" after ")[0] in CALLS and sum(n > 1 for n in shape) > 1


def _uses(s: Site) -> str:
    return ", ".join(s.ops) + (f" ({', '.join(s.views)})" if s.views else "")


def _likeness(text: str, path: str) -> float:
    match = difflib.SequenceMatcher(None, text, path)
    return sum(block.size for block in match.get_matching_blocks()) / max(len(text), 1)


def _flops(n: int) -> str:
    for unit, size in (("TFLOP", 10**12), ("GFLOP", 10**9), ("MFLOP", 10**6), ("kFLOP", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} FLOP" if n else ""


def _matches(pattern: str, site: Site) -> bool:
    if pattern == "all-linear":
        if any(op.startswith("gather") for op in site.ops):
            return False
        if {*MATMULS} & {*site.ops}:
            return bool({"dot", "ragged_dot"} & {*site.ops})
        return "i" in site.kinds and any(may_be_matmul(op, site.shape) for op in site.ops)
    try:
        return re.search(pattern, site.path) is not None
    except re.error as e:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {e}") from e


def _suits(method: Method | None, site: Site) -> bool:
    return method is None or "i" in site.kinds or type(method).vectors
