"""Inner products and projections of lists of tensors, against flat float64 ones."""

from __future__ import annotations

import pytest
import torch

from sam.vectors import dot, orthogonal


def vectors(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((300, 400), (7,), (), (0,))
    return [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(2)]


def flat(tensors):
    return torch.cat([t.double().reshape(-1) for t in tensors])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dot(dtype):
    a, b = vectors(dtype)
    a = [x + 1 for x in a]  # away from cancellation
    b = [x + 1 for x in b]
    found = dot(a, b)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(flat(a) @ flat(b)), rel=1e-8)
    assert float(dot([], [])) == 0


def test_orthogonal():
    a, b = vectors(torch.float64)
    found = orthogonal(a, b)
    u, v = flat(a), flat(b)
    torch.testing.assert_close(flat(found), u - (u @ v) / (v @ v) * v, rtol=1e-12, atol=1e-14)
    assert abs(float(flat(found) @ v)) < 1e-9
    # One projection over all tensors, not one per tensor.
    assert abs(float((found[0] * b[0]).sum())) > 1


def test_orthogonal_to_nothing_and_to_itself():
    a, _ = vectors()
    zero = [torch.zeros_like(x) for x in a]
    assert all(torch.equal(x, y) for x, y in zip(orthogonal(a, zero), a, strict=True))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in orthogonal(a, a))
