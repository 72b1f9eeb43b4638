"""How many coordinates a budgeted mask keeps: one exact rule for all builders."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from masks.errors import MaskError

if TYPE_CHECKING:
    from masks.mask import Mask


def _exact(value: float | str | Fraction, what: str) -> Fraction:
    """The number as it is written: 0.1 means one tenth, not the nearest binary fraction."""
    try:
        exact = value if isinstance(value, Fraction) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise MaskError(f"{what} must be a number between 0 and 1, got {value!r}") from None
    if not 0 <= exact <= 1:
        raise MaskError(f"{what} must lie between 0 and 1, got {value}")
    return exact


@dataclass(frozen=True)
class Budget:
    """Exactly ``num_kept`` of ``numel`` coordinates.

    Raises:
        MaskError: ``num_kept`` is negative, more than ``numel`` or not a whole number; or ``numel`` is 0.
    """

    num_kept: int
    numel: int

    def __post_init__(self) -> None:
        for name in ("num_kept", "numel"):
            try:
                object.__setattr__(self, name, operator.index(getattr(self, name)))
            except TypeError:
                raise MaskError(f"{name} must be a whole number, got {getattr(self, name)!r}") from None
        if not 0 <= self.num_kept <= self.numel or not self.numel:
            raise MaskError(f"cannot keep {self.num_kept} of {self.numel} coordinates")

    @classmethod
    def from_density(cls, density: float | str | Fraction, numel: int) -> Budget:
        """Keep ``floor(density * numel + 1/2)`` coordinates, computed exactly.

        Args:
            density: fraction kept, read as the decimal number that it is written as.
            numel: number of eligible coordinates.

        Raises:
            MaskError: the density is not in [0, 1], or is positive and keeps no coordinate (or below 1 and
                keeps all of them): the mask would silently be another one than asked for.
        """
        exact = _exact(density, "density")
        kept = math.floor(exact * numel + Fraction(1, 2))
        if (kept == 0) != (exact == 0) or (kept == numel) != (exact == 1):
            raise MaskError(
                f"density {density} of {numel} coordinates is out of reach: it would keep {kept}; "
                f"the steps are multiples of 1/{numel}"
            )
        return cls(kept, numel)

    @classmethod
    def from_sparsity(cls, sparsity: float | str | Fraction, numel: int) -> Budget:
        """The budget of ``density = 1 - sparsity``, without a rounding rule of its own."""
        return cls.from_density(1 - _exact(sparsity, "sparsity"), numel)

    @classmethod
    def matching(cls, mask: Mask, numel: int | None = None) -> Budget:
        """As many coordinates as ``mask`` keeps.

        Args:
            mask: the reference.
            numel: the denominator, if it is not the mask's own (the reference was built on a model with
                other frozen parameters).
        """
        return cls(mask.num_kept, mask.numel if numel is None else numel)

    @property
    def density(self) -> float:
        return self.num_kept / self.numel

    @property
    def sparsity(self) -> float:
        return (self.numel - self.num_kept) / self.numel
