"""The k best of scores in many tensors, against a stable sort of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.mask_cost import extra_bytes
from masks import ranking
from masks.ranking import Ranking


def by_sorting(scores: list[Tensor], k: int, *, largest: bool) -> Tensor:
    flat = torch.cat([s.reshape(-1).double() for s in scores])
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[flat.sort(descending=largest, stable=True).indices[:k]] = True
    return keep


def drawn(kind: str, n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    return {
        "normal": lambda: x,
        "many zeros": lambda: torch.where(torch.rand(n, generator=g) < 0.6, 0.0, x),
        "few values": lambda: x.round(),
        "two values": lambda: (x > 1).float(),
        "equal": lambda: torch.full((n,), 3.0),
        "heavy tails": lambda: x**9,
        "infinities": lambda: torch.where(x.abs() > 1, x.sign() * torch.inf, x),
        "sorted": lambda: x.sort().values,
        "outliers": lambda: torch.where(torch.arange(n) % 5_000 == 7, 1e9 * x, 1e-9 * x),
    }[kind]()


KINDS = ["normal", "many zeros", "few values", "two values", "equal", "heavy tails", "infinities", "sorted", "outliers"]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float | None, float | None]]:
    """The pivots of every round, with chunks and copies so small that 20,001 scores are many."""
    seen: list[tuple[float | None, float | None]] = []
    between = Ranking._between

    def watched(self: Ranking, a: float | None, b: float | None) -> tuple[Tensor | None, int, int]:
        seen.append((a, b))
        return between(self, a, b)

    monkeypatch.setattr(Ranking, "_between", watched)
    monkeypatch.setattr(ranking, "_FEW", 64)
    monkeypatch.setattr(ranking, "_SORTED", 0)
    monkeypatch.setattr(ranking, "_CHUNK", 1_003)
    return seen


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_are_those_of_a_stable_sort(kind: str, largest: bool, rounds: list[object]) -> None:
    flat = drawn(kind, 20_001)
    scores = [flat[:7_000].view(70, 100), flat[7_000:7_000], flat[7_000], flat[7_001:]]
    ranked = Ranking(scores, largest=largest)
    for k in (1, 2, 10, 200, 2_001, 6_667, 10_000, 15_000, 19_800, 20_000, 20_001):
        found = ranked.best(k)
        assert [len(f) for f in found] == [7_000, 0, 1, 13_000]
        assert torch.equal(torch.cat(found), by_sorting(scores, k, largest=largest)), k
    assert len(rounds) >= 11


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_few_of_few_scores_are_those_of_a_stable_sort(kind: str, largest: bool) -> None:
    scores = drawn(kind, 3_001)
    for k in (1, 2, 3, 10, 100, 374, 375, 376):
        assert torch.equal(Ranking([scores], largest=largest).best(k)[0], by_sorting([scores], k, largest=largest)), k


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", ["normal", "many zeros", "few values"])
def test_small_tensors_are_ranked_together(kind: str, largest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted, where they are few, and compared in joined chunks, where they are many."""
    scores = list(drawn(kind, 20_003).split([300] * 40 + [0, 1, 7_001, 1_001]))
    for most in (2**17, 0):
        monkeypatch.setattr(ranking, "_SORTED", most)
        monkeypatch.setattr(ranking, "_FEW", 2**14 if most else 64)
        monkeypatch.setattr(ranking, "_CHUNK", 1_003)
        for k in (1, 2, 50, 2_500, 2_501, 12_000, 20_002):
            found = Ranking(scores, largest=largest).best(k)
            assert [len(f) for f in found] == [len(s) for s in scores]
            assert torch.equal(torch.cat(found), by_sorting(scores, k, largest=largest)), (most, k)


@pytest.mark.parametrize("largest", [True, False])
def test_one_reading_between_two_pivots_is_the_rule(largest: bool, rounds: list[object]) -> None:
    ranked = Ranking([drawn("normal", 20_001).exp()], largest=largest)
    for k in range(100, 20_000, 500):
        ranked.best(k)
    assert len(rounds) == 40


Bound = float | None


@pytest.mark.parametrize("then", ["another round", "a copy"])
@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("kind", ["normal", "few values", "many zeros"])
def test_pivots_that_miss_cost_a_round_and_nothing_else(
    kind: str, off: int, then: str, rounds: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second sample may have no score between the pivots: then all scores there are copied."""
    pivots, calls = Ranking._pivots, []

    def missing(self: Ranking, share: float, low: Bound, high: Bound) -> tuple[Bound, Bound]:
        calls.append(share)
        if len(calls) > 1 and then == "a copy":
            return low, high
        # In the first round a third of all scores too far to one side.
        return pivots(self, min(max(share + off / 3, 0.02), 0.98) if len(calls) == 1 else share, low, high)

    monkeypatch.setattr(Ranking, "_pivots", missing)
    scores = [drawn(kind, 20_001, seed=1)]
    counts = scores[0].unique(return_counts=True)[1].flip(0).cumsum(0).tolist() if kind == "few values" else []
    for k in (7_000, 10_000, 13_000, *counts, *(c + 1 for c in counts[:-1])):
        calls.clear()
        assert torch.equal(Ranking(scores, largest=True).best(k)[0], by_sorting(scores, k, largest=True)), k
        assert len(calls) == 2 or kind != "normal"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_layouts(dtype: torch.dtype, rounds: list[object]) -> None:
    scores = [drawn("normal", 12_000).view(30, 400).T.to(dtype), drawn("normal", 8_001, seed=1).to(dtype)]
    for k in (3, 5_000, 19_000):
        assert torch.equal(torch.cat(Ranking(scores, largest=True).best(k)), by_sorting(scores, k, largest=True))


def test_scores_of_two_dtypes_are_compared_in_the_wider(rounds: list[object]) -> None:
    single = drawn("normal", 10_000)
    scores = [single, single.double() + 1e-12]
    keep = Ranking(scores, largest=True).best(1)
    assert int(keep[0].sum()) == 0
    assert int(keep[1].nonzero()) == int(single.argmax())


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0005, 0.5])
def test_no_copy_of_the_scores_is_made(share: float) -> None:
    n = 8_000_000
    # The result takes a byte for each score, which takes four; the rest stays below a quarter of a copy.
    assert n / 2 < extra_bytes(n, int(share * n)) < n + n
