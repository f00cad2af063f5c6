"""What a hyper-parameter may be.

Deviates: nothing.
"""

from typing import Any

import numpy as np


def check_whole(name: str, got: Any, least: int = 1) -> None:
    """Raises ValueError unless `got` is an integer of at least `least`."""
    if isinstance(got, bool) or not isinstance(got, int | np.integer) or got < least:
        raise ValueError(f"{name}: got {got!r}, expected an integer of at least {least}")
