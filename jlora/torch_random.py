"""The numbers that torch's CPU generator draws, without torch: some files hold only a seed.

.. math::
    u = (\\mathrm{mt19937}() \\bmod 2^{24}) \\, 2^{-24}, \\qquad x = \\mathrm{fma}(u, b - a, a)

and permutations by Fisher and Yates, place i changing with place i + (mt19937() mod (n - i)).
Normal numbers are those of Box and Muller, the cosine and the sine of one pair of uniform ones:
fewer than 16 one pair after the other, from numbers of 53 bits; others in blocks of 16, of which
the first half makes the radii and the second the angles, and the last block, if it is not whole, is
drawn again over the last 16 places.

Reference: what torch 2.13 returns on x86-64 (fused multiply-add, float32).
Deviates: normal numbers differ in the last bits, as the logarithms and cosines of builds of torch
do. Nothing else that was seen; builds without fused multiply-add differ in the last bit.
"""

from __future__ import annotations

import math

import numpy as np


class Generator:
    """`torch.Generator(device="cpu").manual_seed(seed)`.

    Args:
      seed: only its low 32 bits count.
    """

    def __init__(self, seed: int):
        self._raw = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None  # the second of a pair of normal numbers

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        """What `torch.empty(shape).uniform_(low, high, generator=...)` draws.

        Args:
          shape: of the array.
          low: least value.
          high: upper bound, which may be reached by rounding.

        Returns:
          float32 of `shape`.
        """
        raw = self._raw.randint(0, 2**32, size=shape, dtype=np.uint32)
        unit = (raw & np.uint32(2**24 - 1)).astype(np.float64) * 2.0**-24
        a, b = np.float32(low), np.float32(high)
        return (unit * np.float64(b - a) + np.float64(a)).astype(np.float32)

    def normal(self, shape: tuple[int, ...], deviation: float) -> np.ndarray:
        """What `torch.normal(0.0, deviation, size=shape, generator=...)` draws.

        Args:
          shape: of the array.
          deviation: of the numbers.

        Returns:
          float32 of `shape`, to the last bits.
        """
        size = math.prod(shape)
        if size >= 16:
            unit = self.uniform((size,), 0.0, 1.0)
            values = np.empty(size, np.float32)
            for start in range(0, size - 15, 16):
                values[start : start + 16] = _block(unit[start : start + 16], deviation)
            if size % 16:
                values[-16:] = _block(self.uniform((16,), 0.0, 1.0), deviation)
            return values.reshape(shape)
        return np.asarray([self._one() * deviation for _ in range(size)], np.float32).reshape(shape)

    def _one(self) -> float:
        """The next normal number of a short draw; of a pair, the second is kept for the next."""
        if self._spare is not None:
            one, self._spare = self._spare, None
            return one
        words = self._raw.randint(0, 2**32, size=(2, 2), dtype=np.uint32)
        angle, radius = (((int(a) << 32 | int(b)) % 2**53) * 2.0**-53 for a, b in words)
        angle, radius = 2 * math.pi * angle, math.sqrt(-2 * math.log1p(-radius))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def permutation(self, n: int, count: int) -> np.ndarray:
        """The first `count` of `torch.randperm(n, generator=...)`.

        Args:
          n: numbers to permute, 0 to n - 1.
          count: how many are wanted.

        Returns:
          int64 [count].

        Raises:
          ValueError: count outside 0..n, or an n for which torch draws in another way.
        """
        if not 0 <= count <= n or n >= 2**32 // 20:
            raise ValueError(f"permutation: got {count} of {n}, expected at most {2**32 // 20 - 1}")
        draws = self._raw.randint(0, 2**32, size=max(n - 1, 0), dtype=np.uint32)
        moved: dict[int, int] = {}  # place -> what is there, where it is not itself
        out = np.empty(count, np.int64)
        for i in range(count):
            j = i + int(draws[i]) % (n - i) if i < n - 1 else i
            out[i] = moved.get(j, j)
            moved[j] = moved.get(i, i)
        return out


def _block(unit: np.ndarray, deviation: float) -> np.ndarray:
    """16 normal numbers of 16 uniform ones, as torch makes them of float32."""
    radius = np.sqrt(-2 * np.log(1 - unit[:8].astype(np.float64)))
    angle = (np.float32(2 * np.pi) * unit[8:]).astype(np.float64)
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return (both * deviation).astype(np.float32)
