"""What a hyper-parameter may be.

Deviates: nothing.
"""

import numpy as np

from jlora.types import Dynamic


def check_whole(name: str, got: Dynamic, least: int = 1) -> None:
    """Refuses a hyper-parameter that is not a whole number.

    Args:
      name: of the hyper-parameter, for the message.
      got: its value; Python and numpy integers pass, booleans do not.
      least: the smallest value allowed; 1, as most are counts.

    Raises:
      ValueError: `got` is not an integer, or less.
    """
    if isinstance(got, bool) or not isinstance(got, int | np.integer) or got < least:
        raise ValueError(f"{name}: got {got!r}, expected an integer of at least {least}")
