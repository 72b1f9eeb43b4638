"""Exact selection, against sorting."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from masks import BuilderError, MaskError, ParamTable, select, top_k
from masks.select import proportional_counts

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def by_sorting(scores: list[float], k: int, *, largest: bool = True) -> list[bool]:
    """The k best by (score, index), equal ones by lowest index."""
    sign = -1 if largest else 1
    chosen = set(sorted(range(len(scores)), key=lambda i: (sign * scores[i], i))[:k])
    return [i in chosen for i in range(len(scores))]


def tied_scores(n: int, seed: int) -> list[float]:
    values = [-math.inf, -2.0, -0.0, 0.0, 1.0, 1.0, 3.5, math.inf]
    return random.Random(seed).choices(values, k=n)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_top_k_is_sorting(seed: int, dtype: torch.dtype, largest: bool) -> None:
    scores = tied_scores(23, seed)
    for k in range(24):
        keep = top_k(torch.tensor(scores, dtype=dtype), k, largest=largest)
        assert keep.dtype == torch.bool
        assert keep.tolist() == by_sorting(scores, k, largest=largest)


def test_top_k_of_equal_scores_takes_the_first() -> None:
    assert top_k(torch.zeros(5), 2).tolist() == [True, True, False, False, False]
    assert top_k(torch.tensor([-0.0, 0.0, -0.0]), 1).tolist() == [True, False, False]
    assert top_k(torch.tensor([-0.0, 0.0, -0.0]), 1, largest=False).tolist() == [True, False, False]


def test_top_k_of_many() -> None:
    scores = torch.randn(100_003, generator=torch.Generator().manual_seed(0)).mul(50).round()
    assert len(scores.unique()) < 500
    for k in (1, 9_600, 50_001, 100_002):
        assert top_k(scores, k).tolist() == by_sorting(scores.tolist(), k)


def test_top_k_of_none_and_all_and_out_of_range() -> None:
    scores = torch.tensor([1.0, 2.0])
    assert not top_k(scores, 0).any()
    assert top_k(scores, 2).all()
    assert top_k(torch.empty(0), 0).shape == (0,)
    for k in (-1, 3):
        with pytest.raises(MaskError, match=f"cannot select {k} of 2"):
            top_k(scores, k)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("largest", [True, False])
def test_top_k_is_the_same_on_a_gpu(largest: bool) -> None:
    scores = torch.tensor(tied_scores(100_003, 5))
    for k in (0, 1, 9_600, 50_001, 100_003):
        on_gpu = top_k(scores.cuda(), k, largest=largest)
        assert on_gpu.is_cuda
        assert torch.equal(on_gpu.cpu(), top_k(scores, k, largest=largest))


class Odd(nn.Module):
    """Tensors of 0, 1 and 2 dimensions, one without entries, one with a single entry in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        for i, shape in enumerate([(3, 4), (), (0, 2), (5,), (1, 1), (2, 3)]):
            self.register_parameter(f"p{i}", nn.Parameter(torch.zeros(shape)))


@pytest.fixture
def table() -> ParamTable:
    return ParamTable.from_model(Odd())


def scores_of(table: ParamTable, seed: int) -> list[Tensor]:
    flat = torch.tensor(tied_scores(table.numel, seed))
    parts = torch.split(flat, [row.numel for row in table])
    return [part.reshape(row.shape) for row, part in zip(table, parts, strict=True)]


def flat_of(parts: tuple[bool | Tensor, ...], table: ParamTable) -> list[bool]:
    dense = [
        torch.full(row.shape, p, dtype=torch.bool) if isinstance(p, bool) else p
        for row, p in zip(table, parts, strict=True)
    ]
    for part, row in zip(dense, table, strict=True):
        assert part.shape == row.shape
    return torch.cat([part.reshape(-1) for part in dense]).tolist()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_select_ranks_all_coordinates_together(table: ParamTable, seed: int, largest: bool) -> None:
    scores = scores_of(table, seed)
    flat = [x for score in scores for x in score.reshape(-1).tolist()]
    for k in range(table.numel + 1):
        assert flat_of(select(table, scores, k, largest=largest), table) == by_sorting(flat, k, largest=largest)


@pytest.mark.parametrize("largest", [True, False])
def test_select_per_layer(table: ParamTable, largest: bool) -> None:
    scores = scores_of(table, 4)
    sizes = [row.numel for row in table]
    for k in range(table.numel + 1):
        expected: list[bool] = []
        for score, count in zip(scores, proportional_counts(sizes, k), strict=True):
            expected += by_sorting(score.reshape(-1).tolist(), count, largest=largest)
        parts = flat_of(select(table, scores, k, largest=largest, per_layer=True), table)
        assert parts == expected
        assert sum(parts) == k


@pytest.mark.parametrize("per_layer", [True, False])
def test_select_among_eligible_tensors(table: ParamTable, per_layer: bool) -> None:
    eligible = [False, True, True, True, False, True]
    scores = [torch.full(row.shape, 9.0 if not ok else 1.0) for row, ok in zip(table, eligible, strict=True)]
    for k in range(13):
        parts = select(table, scores, k, per_layer=per_layer, eligible=eligible)
        assert sum(flat_of(parts, table)) == k
        assert parts[0] is False
        assert parts[4] is False
    with pytest.raises(MaskError, match="cannot keep 13 coordinates: only 12 of 25 are eligible"):
        select(table, scores, 13, per_layer=per_layer, eligible=eligible)
    with pytest.raises(MaskError, match="only 0 of 25"):
        select(table, scores, 1, per_layer=per_layer, eligible=[False] * 6)
    with pytest.raises(MaskError, match="eligible must say of each of 6"):
        select(table, scores, 1, per_layer=per_layer, eligible=[True] * 5)


def test_select_compares_mixed_dtypes_in_the_wider_one() -> None:
    table = ParamTable.from_model(nn.Linear(2, 1))
    scores = [torch.tensor([[1.0, 2.0]]), torch.tensor([1.0 + 1e-12], dtype=torch.float64)]
    # In float32 the last score would tie with the first and lose to it.
    assert flat_of(select(table, scores, 2), table) == [False, True, True]
    assert flat_of(select(table, [scores[0], scores[1].float()], 2), table) == [True, True, False]
    half = [torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), torch.tensor([1.001], dtype=torch.float16)]
    assert flat_of(select(table, half, 2), table) == [False, True, True]


def test_select_reads_scores_in_c_order() -> None:
    table = ParamTable.from_model(nn.Linear(3, 2, bias=False))
    scores = torch.tensor([[1.0, 5.0], [1.0, 5.0], [0.0, 5.0]]).T
    assert not scores.is_contiguous()
    assert flat_of(select(table, [scores], 4), table) == [True, False, False, True, True, True]


def test_select_takes_scores_with_a_graph(table: ParamTable) -> None:
    scores = [score.requires_grad_() for score in scores_of(table, 0)]
    assert not any(part.requires_grad for part in select(table, scores, 5) if isinstance(part, Tensor))


@pytest.mark.parametrize("per_layer", [True, False])
def test_select_refuses_wrong_scores(table: ParamTable, per_layer: bool) -> None:
    def refused(message: str, scores: object) -> None:
        with pytest.raises(BuilderError, match=message):
            select(table, scores, 3, per_layer=per_layer)  # type: ignore[arg-type]

    good = scores_of(table, 0)
    refused(r"must return 6 tensors \(one per parameter\), got 5", good[:5])
    refused(r"must return 6 tensors", [*good, torch.zeros(1)])
    refused(r"the scores of p0 must have shape \(3, 4\), got \(4, 3\)", [good[0].T, *good[1:]])
    refused(r"the scores of p1 must have shape \(\), got float", [good[0], 1.0, *good[2:]])
    refused(r"the scores of p3 must be floating point, got torch.int64", [*good[:3], good[3].isnan().long(), *good[4:]])
    wrong = torch.tensor([0.0, math.nan, 1.0, math.nan, 2.0])
    refused(r"2 of 5 scores of p3 are NaN", [*good[:3], wrong, *good[4:]])
    refused(r"must return a list of tensors, got generator", (score for score in good))
    refused(r"must return a list of tensors, got Tensor", torch.zeros(6))


def by_remainder(sizes: list[int], total: int) -> list[int]:
    """The largest-remainder method, one seat at a time."""
    shares = [Fraction(size * total, sum(sizes)) for size in sizes]
    counts = [math.floor(share) for share in shares]
    left = [share - count for share, count in zip(shares, counts, strict=True)]
    while sum(counts) < total:
        i = left.index(max(left))
        counts[i] += 1
        left[i] = Fraction(-1)
    return counts


@pytest.mark.parametrize("sizes", [[7], [1, 1, 1], [3, 0, 5, 2], [64, 64, 128, 1, 9408], [1, 1000, 10]])
def test_proportional_counts(sizes: list[int]) -> None:
    n = sum(sizes)
    for total in [*range(min(n, 40) + 1), n // 3, n - 1, n, 2 * n + 1]:
        counts = proportional_counts(sizes, total)
        assert counts == by_remainder(sizes, total)
        assert sum(counts) == total
        assert all(abs(Fraction(s * total, n) - c) < 1 for s, c in zip(sizes, counts, strict=True))
        if total <= n:
            assert all(c <= s for s, c in zip(sizes, counts, strict=True))


def test_proportional_counts_gives_equal_remainders_to_the_first() -> None:
    assert proportional_counts([2, 2, 2, 2], 2) == [1, 1, 0, 0]
    assert proportional_counts([10**12, 1], 10**12) == [10**12 - 1, 1]
