"""Seeds: every purpose of a run has a random stream of its own.

A run that differs from another one only in its mask therefore starts from the same weights, sees the same
images in the same order and has the same noisy labels: runs are paired by construction, not by care.
"""

from __future__ import annotations

import hashlib
import json
import operator


def derive_seed(seed: int, *names: str) -> int:
    """The seed of one purpose of a run.

    The first 63 bits of SHA-256 over the seed and the names. It does not depend on the machine or on the
    versions of Python, numpy and torch, and both ``torch.manual_seed`` and ``numpy.random.PCG64`` take it.

    Args:
        seed: the seed of the run, any integer.
        names: what the stream is for, such as ``"init"`` or ``"mask", "random"``. ``("a", "b")`` and
            ``("ab",)`` are different purposes.

    Returns:
        An integer from 0 to 2**63 - 1.

    Raises:
        TypeError: ``seed`` is not an integer.
    """
    text = json.dumps([operator.index(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
