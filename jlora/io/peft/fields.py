"""What the reader of PEFT's config asks of a method's table: which fields there are.

Source: peft 0.21.2, read for its behaviour.
Deviates: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from jlora.types import Json


class Fields(Protocol):
    """What a method's table says of its config fields."""

    @property
    def type(self) -> str:
        """PEFT's ``peft_type``."""
        ...

    @property
    def fields(self) -> Mapping[str, Json]:
        """Those that the maths uses, with PEFT's defaults."""
        ...

    @property
    def patterns(self) -> Mapping[str, str]:
        """Field -> the field that overrides it by module."""
        ...

    @property
    def fixed(self) -> Mapping[str, Json]:
        """Fields of which only this value can be represented."""
        ...

    @property
    def choose(self) -> Mapping[str, Json]:
        """Fields that distinguish this table from others of the same type."""
        ...

    @property
    def masks(self) -> tuple[str, str] | None:
        """(field, suffix) of a field of lists of booleans by module; None: none."""
        ...

    @property
    def allowed(self) -> Mapping[str, tuple[Json, ...]]:
        """Field -> the values that can be read."""
        ...

    @property
    def reasons(self) -> Mapping[str, str]:
        """Field -> why its other values cannot be read."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields that must be there."""
        ...

    @property
    def lacks(self) -> tuple[str, ...]:
        """Fields of `TARGETS` that this type does not have."""
        ...

    @property
    def free(self) -> Mapping[str, Json]:
        """Fields of any value, as they do not change the saved function, with what to write."""
        ...
