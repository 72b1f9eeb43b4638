"""The k best of the scores in many tensors, without a copy of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

_FEW = 2**14
"""So many scores are simply copied; of more, n, at most ``6 n^(2/3)``: 6 % of a million, 1.3 % of 1e8."""
_SORTED = 2**17
"""Of so few scores less than an eighth is found soonest by sorting the best ones."""
_CHUNK, _CHUNK_ELSEWHERE = 2**16, 2**26
"""Scores compared at a time: on a CPU as many as stay in its cache; elsewhere few large operations are better. Smaller
tensors are copied together, for as long as they are compared."""
_DEVIATIONS = 4


class Ranking:
    """The scores of several tensors ranked together, best first, equal ones by position.

    The k-th best is found as by Floyd and Rivest (1975, Expected time bounds for selection): of a random sample of
    ``n^(2/3)`` scores two are taken as pivots, between which the k-th lies with a probability of 0.9999; one reading of
    all scores counts those beyond the pivots and copies those between. Where the k-th is not among these, or they are
    too many, the next round samples between the nearest pivots. Luck decides the time only: the result is exact.

    Args:
        scores: one or more tensors of floating point, without NaN, positions counted in C order. The first one's device
            and the widest dtype are those in which they are compared.
        largest: whether the largest are best, or the smallest.
    """

    def __init__(self, scores: Sequence[Tensor], *, largest: bool) -> None:
        self._largest = largest
        self._dtype = reduce(torch.promote_types, (score.dtype for score in scores))
        self._device = scores[0].device
        self._sizes = [score.numel() for score in scores]
        self._n = sum(self._sizes)
        self._few = max(_FEW, round(6 * self._n ** (2 / 3)))
        self._chunk = _CHUNK if self._device.type == "cpu" else _CHUNK_ELSEWHERE
        self._groups = _together([score.detach() for score in scores], self._chunk)

    def best(self, k: int) -> list[Tensor]:
        """Which are the k best, 1 <= k <= n: one flat boolean tensor per tensor of scores."""
        keep = self._best_by_sorting(k)
        return list(torch.split(self._compared(k) if keep is None else keep, self._sizes))

    def _best_by_sorting(self, k: int) -> Tensor | None:
        """The k best of few scores; None where that is not the way, or the k-th and the next one are equal."""
        if self._n > _SORTED or 8 * k >= self._n:
            return None
        flat = list(self._flat())
        scores = flat[0] if len(flat) == 1 else torch.cat(flat)
        values, positions = torch.topk(scores, k + 1, largest=self._largest)
        last, following = values[k - 1 :].tolist()
        if last == following:  # topk takes equal scores in any order
            return None
        return torch.zeros(self._n, dtype=torch.bool, device=self._device).index_fill_(0, positions[:k], 1)

    def _compared(self, k: int) -> Tensor:
        """The k best as those above the k-th, and the first of those equal to it."""
        threshold, better, equal = self._kth(k)
        missing = k - better
        out = torch.empty(self._n, dtype=torch.bool, device=self._device)
        start = 0
        for chunk in self._chunks():
            keep = out[start : start + len(chunk)]
            start += len(chunk)
            if missing == equal:  # all that equal the k-th are kept, mostly itself alone
                torch.ge(chunk, threshold, out=keep)
                continue
            torch.gt(chunk, threshold, out=keep)
            if missing:
                tied = (chunk == threshold).nonzero().squeeze(1)
                keep[tied[:missing]] = True
                missing, equal = max(0, missing - len(tied)), equal - len(tied)
        return out

    def _flat(self) -> Iterator[Tensor]:
        """All scores in order, small tensors joined, in one dtype on one device."""
        for group in self._groups:
            parts = [score.reshape(-1).to(self._device, self._dtype) for score in group]
            yield parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chunks(self) -> Iterator[Tensor]:
        """The same in pieces; the smallest are best made the largest by their sign."""
        for flat in self._flat():
            for chunk in torch.split(flat, self._chunk):
                yield chunk if self._largest else -chunk

    def _kth(self, k: int) -> tuple[float, int, int]:
        """The k-th best score, how many are better, and how many equal it."""
        if self._n <= _FEW:
            return _kth_of(torch.cat(list(self._chunks())), k, 0)
        low: float | None = None  # it lies in the open interval (low, high)
        high: float | None = None
        above, reach = 0, self._n  # how many are >= high, and > low
        while reach - above > self._few:
            a, b = self._pivots((k - above) / (reach - above), low, high)
            if (a, b) == (low, high):
                break
            found, at_least_b, over_a = self._between(a, b)
            if at_least_b < k <= over_a:
                low, high, above, reach = a, b, at_least_b, over_a
                if found is not None:
                    return _kth_of(found, k, above)
            elif b is not None and k <= at_least_b:
                over_b = self._count(torch.gt, b)
                if k > over_b:
                    return b, over_b, at_least_b - over_b
                low, reach = b, over_b
            elif a is not None:
                at_least_a = self._count(torch.ge, a)
                if k <= at_least_a:
                    return a, over_a, at_least_a - over_a
                high, above = a, at_least_a
        found = torch.cat([chunk[_inside(chunk, low, high)] for chunk in self._chunks()])
        return _kth_of(found, k, above)

    def _pivots(self, share: float, low: float | None, high: float | None) -> tuple[float | None, float | None]:
        """Two scores inside (low, high) around the one that a share of those inside is better than.

        Or the bounds themselves, where the sample has none so far out.
        """
        generator = torch.Generator().manual_seed(self._n)
        rate = self._n ** (-1 / 3)
        parts: list[Tensor] = []
        for flat in self._flat():
            drawn = torch.randint(len(flat), (math.ceil(rate * len(flat)),), generator=generator)
            parts.append(flat[drawn.to(flat.device)])
        sample = torch.cat(parts) if self._largest else -torch.cat(parts)
        sample = sample[_inside(sample, low, high)]
        m = len(sample)
        margin = _DEVIATIONS * (1 + math.sqrt(m * share * (1 - share)))
        first, last = math.floor(m * share - margin), math.ceil(m * share + margin)
        a = float(torch.kthvalue(sample, m - last).values) if last < m else low
        return a, (float(torch.kthvalue(sample, m - first).values) if first >= 0 else high)

    def _between(self, a: float | None, b: float | None) -> tuple[Tensor | None, int, int]:
        """The scores in the open interval (a, b), None if they are too many; how many are >= b, and > a."""
        found: list[Tensor] = []
        count = at_least_b = 0
        for chunk in self._chunks():
            inside = _inside(chunk, a, b)
            if b is not None:
                at_least_b += int(torch.count_nonzero(chunk >= b))
            if count <= self._few:
                found.append(_few_of(chunk, inside))
                count += len(found[-1])
            else:
                found = []
                count += int(torch.count_nonzero(inside))
        return (torch.cat(found) if count <= self._few else None), at_least_b, at_least_b + count

    def _count(self, compare: Callable[[Tensor, float], Tensor], bound: float) -> int:
        return sum(int(torch.count_nonzero(compare(chunk, bound))) for chunk in self._chunks())


def _together(scores: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    """The tensors in order, divided into groups: each of one tensor, or of several with at most so many scores."""
    groups: list[list[Tensor]] = []
    room = -1
    for score in scores:
        if not score.numel():
            continue
        room -= score.numel()
        if room < 0:
            groups.append([])
            room = most - score.numel()
        groups[-1].append(score)
    return groups


def _inside(scores: Tensor, low: float | None, high: float | None) -> Tensor:
    """Which scores lie in the open interval (low, high); None bounds nothing."""
    if low is None:
        return torch.ones_like(scores, dtype=torch.bool) if high is None else scores < high
    return scores > low if high is None else (scores > low).logical_and_(scores < high)


def _few_of(scores: Tensor, wanted: Tensor) -> Tensor:
    """``scores[wanted]``, faster where few are wanted: eight at a time are looked at."""
    n = len(scores) // 8 * 8
    eights = wanted[:n].view(torch.int64).nonzero().squeeze(1)
    head = scores[:n].view(-1, 8)[eights][wanted[:n].view(-1, 8)[eights]]
    return torch.cat([head, scores[n:][wanted[n:]]])


def _kth_of(found: Tensor, k: int, above: int) -> tuple[float, int, int]:
    """What :meth:`Ranking._kth` returns, where ``above`` scores are better than all that were found."""
    k -= above
    if 2 * k <= len(found):
        threshold = float(torch.topk(found, k, sorted=False).values.min())
    else:
        threshold = float(torch.topk(found, len(found) - k + 1, largest=False, sorted=False).values.max())
    better = int(torch.count_nonzero(found > threshold))
    return threshold, above + better, int(torch.count_nonzero(found == threshold))
