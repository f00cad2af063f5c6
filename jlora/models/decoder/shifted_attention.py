r"""LongLoRA's shifted sparse attention: cheap training at long contexts, full attention afterwards.

A fine-tuned model keeps its architecture; only while it is trained, every head attends within
groups of g neighbouring tokens, and the groups of half of the heads are moved by g/2, so that
information passes from group to group. Attention then costs L g instead of L\ :sup:`2`.

Symbols: L tokens, groups of g of them (the paper: g = L/4), query token t and key token s (from 0),
H heads; m is what the model lets a query see (`jlora.models.decoder.visible`).

.. math::
    t \sim_j s \iff \left\lfloor \frac{t + \delta_j}{g} \right\rfloor =
    \left\lfloor \frac{s + \delta_j}{g} \right\rfloor, \qquad
    \delta_j = \begin{cases} 0 & j < H/2 \\ g/2 & j \ge H/2 \end{cases}

    o_{t,j} = \sum_{s \sim_j t}
    \operatorname{softmax}_s(\alpha\, q_{t,j} k_{s,j} + m_{ts})\, v_{s,j}

    \omega_i \to \omega_i / f \quad \text{(position interpolation to a context f times as long)}

The recipe: `interpolated` stretches the positions, LoRA (rank 8, alpha 16) adapts the kernels of
query, key, value and out, and the embedding table and all norms are trained as they are
(`jlora.TrainableTokens`, `jlora.LNTuning`); train with ``attend=ShiftedAttention(L // 4)``, use the
result with the default attention.

Reference: Chen et al. 2023 (arXiv:2309.12307) for the groups and what is trained; Chen et al. 2023
    (arXiv:2306.15595) for the interpolation.
Deviates: the first and the last half group of the moved heads are groups of their own, as in the
    flash-attention path of the authors' code. Their other path rolls the tokens around the end and
    masks each group as if it lay in order, so that the first g/2 tokens see the last ones, which
    lie in their future; `wrap` reproduces it for comparisons.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jlora.models.decoder.attention import attend
from jlora.models.decoder.config import DecoderConfig, Rope
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class ShiftedAttention:
    """Attention within groups, those of the second half of the heads moved by half a group.

    A value of `jlora.models.decoder.Attend`; hashable, so it may be a static argument of jit.

    Attributes:
      group: g, an even number of tokens that divides the length of a row.
      shift: whether the second half of the heads is moved; False cuts all flow between groups.
      wrap: the moved groups go around the end and see later tokens, as one path of the authors'
        code has it. Only for comparing with that: a model trained so predicts from the future.

    Raises:
      ValueError: a group that is not a positive even number, or `wrap` without `shift`.
    """

    group: int
    shift: bool = True
    wrap: bool = False

    def __post_init__(self) -> None:
        if self.group < 2 or self.group % 2:
            raise ValueError(f"group: got {self.group}, expected a positive even number")
        if self.wrap and not self.shift:
            raise ValueError("wrap: got True without shift, expected groups that are moved")

    def __call__(
        self,
        q: Float[Array, "b t heads width"],
        k: Float[Array, "b t kv width"],
        v: Float[Array, "b t kv width"],
        visible: Bool[Array, "b t t"],
        *,
        scale: float,
        cap: float,
    ) -> Float[Array, "b t heads width"]:
        """The mixed values by head.

        Args:
          q: queries, rotated.
          k: keys, rotated, of the same tokens.
          v: values.
          visible: what each query may see of its group; `wrap` ignores it in moved groups.
          scale: alpha of the equation.
          cap: as in `jlora.models.decoder.attend`.

        Returns:
          As `jlora.models.decoder.attend`.

        Raises:
          ValueError: keys of other tokens than the queries' (a cache: train without one), a row
            that is not a whole number of groups, or an odd number of heads.
        """
        tokens, heads, kv = q.shape[1], q.shape[2], k.shape[2]
        if k.shape[1] != tokens:
            raise ValueError(f"keys: got {k.shape[1]}, expected {tokens}, those of the queries")
        if tokens % self.group:
            raise ValueError(f"row: got {tokens} tokens, expected a multiple of {self.group}")
        if heads % 2:
            raise ValueError(f"heads: got {heads}, expected an even number")
        if kv % 2:  # a key head would lie in both halves
            k, v = (jnp.repeat(x, heads // kv, axis=2) for x in (k, v))
        (q0, q1), (k0, k1), (v0, v1) = (jnp.split(x, 2, axis=2) for x in (q, k, v))
        move = self.group // 2 if self.shift else 0
        still = self._half(q0, k0, v0, visible, 0, scale, cap)
        moved = self._half(q1, k1, v1, visible, move, scale, cap)
        return jnp.concatenate([still, moved], axis=2)

    def _half(
        self, q: Array, k: Array, v: Array, visible: Array, move: int, scale: float, cap: float
    ) -> Array:
        """Attention of half of the heads, its groups moved by `move` tokens."""
        b, tokens, g = q.shape[0], q.shape[1], self.group
        if move and self.wrap:
            q, k, v = (_groups(jnp.roll(x, -move, axis=1), g) for x in (q, k, v))
            order = jnp.arange(g)
            seen = jnp.broadcast_to(order[None, None] <= order[None, :, None], (len(q), g, g))
            mixed = attend(q, k, v, seen, scale=scale, cap=cap)
            return jnp.roll(mixed.reshape(b, tokens, *mixed.shape[2:]), move, axis=1)
        ends = ((0, 0), (move, move))  # tokens that nobody sees fill the first and last group
        q, k, v = (_groups(jnp.pad(x, (*ends, (0, 0), (0, 0))), g) for x in (q, k, v))
        count = (tokens + 2 * move) // g
        seen = jnp.pad(visible, (*ends, (move, move))).reshape(b, count, g, count, g)
        own = jnp.arange(count)
        seen = jnp.moveaxis(seen[:, own, :, own], 0, 1).reshape(b * count, g, g)
        mixed = attend(q, k, v, seen, scale=scale, cap=cap)
        return mixed.reshape(b, count * g, *mixed.shape[2:])[:, move : move + tokens]


def _groups(x: Array, g: int) -> Array:
    """[b, n g, heads, width] as [b n, g, heads, width]."""
    return x.reshape(-1, g, *x.shape[2:])


def interpolated(config: DecoderConfig, factor: float) -> DecoderConfig:
    """The architecture with positions squeezed into the context it was trained on.

    Args:
      config: of a model without scaled positions.
      factor: f, the new context over the old one, at least 1.

    Returns:
      The same weights fit it; its context is ``factor`` times as long.

    Raises:
      ValueError: a factor below 1, or positions that are scaled already.
    """
    if not factor >= 1:
        raise ValueError(f"factor: got {factor}, expected >= 1")

    def stretched(rope: Rope) -> Rope:
        if rope.scaling != "default":
            raise ValueError(f"rope: scaling: got {rope.scaling!r}, expected 'default'")
        return dataclasses.replace(rope, scaling="linear", factor=float(factor))

    return dataclasses.replace(
        config, rope=stretched(config.rope), max_positions=round(factor * config.max_positions)
    )


SYSTEM = System(
    name="LongLoRA",
    paper="Chen 2023, 2309.12307",
    symbol="ShiftedAttention",
    evidence="a NumPy loop over tokens and heads; no token sees the future, neighbouring groups"
    " reach each other, arithmetic linear in L g",
    rows=(20,),
    claim="long_lora",
)
