"""The numbers that torch's CPU generator draws, without torch: some files hold only a seed.

.. math::
    u = (\\mathrm{mt19937}() \\bmod 2^{24}) \\, 2^{-24}, \\qquad x = \\mathrm{fma}(u, b - a, a)

and permutations by Fisher and Yates, place i changing with place i + (mt19937() mod (n - i)).

Reference: what torch 2.13 returns on x86-64 (fused multiply-add, float32).
Deviates: nothing that was seen; builds of torch without fused multiply-add differ in the last bit.
"""

from __future__ import annotations

import numpy as np


class Generator:
    """`torch.Generator(device="cpu").manual_seed(seed)`.

    Args:
      seed: only its low 32 bits count.
    """

    def __init__(self, seed: int):
        self._raw = np.random.RandomState(seed & 0xFFFFFFFF)

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
