"""The test accuracy of an arm over its seeds, with an interval that counts seeds and images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from analysis import Interval, accuracy_interval
from experiments.record import RunRecord
from experiments.significance import ALPHA

CONFIDENCE = 1 - ALPHA


def accuracy_of(records: Sequence[RunRecord]) -> Interval:
    """95 % interval of an arm's test accuracy, whether its seeds share their test images or draw them."""
    correct = [np.array([c == "1" for c in r.result["test_correct"]]) for r in records]
    if all(r.result["test_is_shared"] for r in records):
        return accuracy_interval(np.array(correct))
    return overlapping_interval(correct, [np.array(r.result["test_index"]) for r in records])


def overlapping_interval(
    correct: Sequence[np.ndarray[Any, np.dtype[np.bool_]]], index: Sequence[np.ndarray[Any, np.dtype[np.int64]]]
) -> Interval:
    """95 % interval of an accuracy over seeds AND images, where each seed tests N images of its own of one pool.

    Two seeds share images, so their accuracies are correlated, and the t interval over seeds alone is too short.
    In the model ``y_si = mu + seed_s + image_i + e_si``, with c the covariance of the seeds' errors on images that
    two of them test, and o the mean over pairs of seeds of (images shared) / N^2,

    ``var(mean) = var(accuracies of the seeds) / n + c o``.

    With n identical test sets o = 1 / N, and this is the crossed design of
    :func:`analysis.stats.accuracy_interval`, which has the references; as there, a negative c is taken as 0,
    degrees of freedom are Satterthwaite's, and the interval is taken on the logit scale (at 0 or 1: exact binomial
    over the distinct images).

    Args:
        correct: for each seed, whether it is right on its test images, N each.
        index: for each seed, the ids of these images.
    """
    n, size = len(correct), len(correct[0])
    images, where = np.unique(np.concatenate(index), return_inverse=True)
    tested, error = np.zeros((n, len(images))), np.zeros((n, len(images)))
    for s, (right, at) in enumerate(zip(correct, where.reshape(n, size), strict=True)):
        tested[s, at] = 1
        error[s, at] = right - right.mean()
    accuracies = np.array([right.mean() for right in correct])
    mean = float(accuracies.mean())
    name = f"accuracy over {n} seeds and {len(images)} test images, of which each seed tests {size}"
    if n == 1:
        return Interval(name, mean, math.nan, math.nan, CONFIDENCE, math.nan, math.nan, 1)
    if mean in (0.0, 1.0):
        exact = stats.binomtest(round(mean * len(images)), len(images)).proportion_ci(CONFIDENCE, method="exact")
        return Interval(name, mean, float(exact.low), float(exact.high), CONFIDENCE, math.nan, math.nan, n)
    pairs = np.triu_indices(n, 1)
    shared = float((tested @ tested.T)[pairs].sum())
    # Deviations from the seed's own mean are a little too small: size / (size - 1).
    covariance = float((error @ error.T)[pairs].sum()) / shared * size / (size - 1) if shared else 0.0
    parts = np.array([accuracies.var(ddof=1) / n, max(covariance, 0.0) * shared / len(pairs[0]) / size**2])
    variance = float(parts.sum())
    if not variance:
        return Interval(name, mean, mean, mean, CONFIDENCE, 0.0, n - 1, n)
    df = variance**2 / float(parts**2 @ (1 / np.array([n - 1, len(images) - 1])))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, df)) * math.sqrt(variance) / (mean * (1 - mean))
    low, high = float(expit(logit(mean) - half)), float(expit(logit(mean) + half))
    return Interval(name, mean, low, high, CONFIDENCE, math.sqrt(variance), df, n)
