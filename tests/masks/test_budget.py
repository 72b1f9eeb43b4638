"""The one rounding rule, against decimal arithmetic."""

from __future__ import annotations

import decimal
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from masks import Budget, Mask, MaskError, ParamTable


def half_up(density: str, n: int) -> int:
    """``density * n`` rounded half up, in decimal."""
    with decimal.localcontext() as context:
        context.prec = 60
        return int((Decimal(density) * n).quantize(Decimal(1), rounding=ROUND_HALF_UP))


@pytest.mark.parametrize(
    ("density", "numel", "kept"),
    [
        (0.1, 11_181_642, 1_118_164),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in binary
        (0.29, 50, 15),  # 14.5
        (0.1, 5, 1),  # 0.5
        (0.3, 5, 2),  # 1.5
        (0.7, 5, 4),  # 3.5
        (0.5, 3, 2),
        (0.001, 500, 1),  # 0.5
        (1 - 0.999, 500, 1),  # the float reads 0.0010000000000000009
        ("0.1", 5, 1),
        ("1/3", 10, 3),
        (Fraction(1, 3), 11, 4),
        (Decimal("0.29"), 50, 15),
        (np.float64(0.29), 50, 15),
        (np.float32(0.29), 50, 15),
        (1e-7, 11_181_642, 1),
        (0, 7, 0),
        (0.0, 7, 0),
        (1, 7, 7),
        (1.0, 7, 7),
    ],
)
def test_from_density(density: float, numel: int, kept: int) -> None:
    budget = Budget.from_density(density, numel)
    assert (budget.num_kept, budget.numel) == (kept, numel)
    assert type(budget.num_kept) is int


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(digits=st.integers(1, 12), seed=st.integers(0, 10**12), numel=st.integers(1, 12_000_000))
def test_from_density_is_decimal_half_up(digits: int, seed: int, numel: int) -> None:
    text = str(Decimal(seed % 10**digits).scaleb(-digits))
    kept = half_up(text, numel)
    if (kept == 0 and Decimal(text) > 0) or kept == numel:
        with pytest.raises(MaskError, match="out of reach"):
            Budget.from_density(text, numel)
    else:
        assert Budget.from_density(text, numel).num_kept == kept
        # A float is read as the shortest decimal that stands for it, and up to 15 digits that is the text.
        assert Budget.from_density(float(text), numel).num_kept == kept


@pytest.mark.parametrize("numel", [1_500, 9_999, 54_321, 11_181_642])
def test_sparsity_is_one_minus_density(numel: int) -> None:
    ties = 0
    for i in range(1, 1000):
        sparsity = i / 1000
        complement = str(1 - Decimal(repr(sparsity)))
        kept = Budget.from_sparsity(sparsity, numel).num_kept
        assert kept == Budget.from_density(complement, numel).num_kept == half_up(complement, numel)
        assert kept == Budget.from_density(float(complement), numel).num_kept
        ties += Decimal(complement) * numel % 1 == Decimal("0.5")
    assert numel != 1_500 or ties == 500


def test_both_halves_round_up() -> None:
    # Half of three: 2 by density and 2 by sparsity; a rule per direction would give 2 and 1.
    assert Budget.from_density(0.5, 3).num_kept == Budget.from_sparsity(0.5, 3).num_kept == 2
    assert Budget.from_sparsity(0.9, 5).num_kept == 1


@pytest.mark.parametrize("make", [Budget.from_density, Budget.from_sparsity])
@pytest.mark.parametrize("value", [-0.1, 1.1, -1e-30, float("nan"), float("inf"), "a lot", "", "1/0", None, True])
def test_out_of_range(make: object, value: float) -> None:
    with pytest.raises(MaskError, match="between 0 and 1"):
        make(value, 100)  # type: ignore[operator]


@pytest.mark.parametrize("numel", [0, 1, 100])
@pytest.mark.parametrize("density", [0.001, 0.999])
def test_unreachable(density: float, numel: int) -> None:
    with pytest.raises(MaskError, match=f"out of reach.*multiples of 1/{numel}"):
        Budget.from_density(density, numel)
    with pytest.raises(MaskError, match="out of reach"):
        Budget.from_sparsity(density, numel)


def test_ends() -> None:
    assert Budget.from_sparsity(0, 10).num_kept == 10
    assert Budget.from_sparsity(1, 10).num_kept == 0


@pytest.mark.parametrize("kept", [-1, 11])
def test_impossible_counts(kept: int) -> None:
    with pytest.raises(MaskError, match=f"cannot keep {kept} of 10"):
        Budget(kept, 10)


def test_only_whole_numbers() -> None:
    assert Budget(np.int64(3), 10) == Budget(3, 10)  # type: ignore[arg-type]
    for kept in (2.5, 2.0, "3", None, float("nan")):
        with pytest.raises(MaskError, match="num_kept must be a whole number"):
            Budget(kept, 10)  # type: ignore[arg-type]
    with pytest.raises(MaskError):
        Budget(0, 0)


def test_density_and_sparsity() -> None:
    budget = Budget(3, 8)
    assert (budget.density, budget.sparsity) == (0.375, 0.625)
    assert Budget(10_000, 10_001).sparsity == 1 / 10_001


def test_matching() -> None:
    table = ParamTable.from_model(nn.Linear(3, 2))
    mask = Mask(table, (torch.tensor([[True, False, True], [False] * 3]), True))
    assert Budget.matching(mask) == Budget(4, 8)
    assert Budget.matching(mask, 100) == Budget(4, 100)
    with pytest.raises(MaskError):
        Budget.matching(mask, 3)
