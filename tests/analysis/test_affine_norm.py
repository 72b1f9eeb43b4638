"""BatchNorm as an affine map, against torch's kernel and against differences of its derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.affine_norm import AffineNorm
from analysis.operator import HessianOperator


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


STATISTICS = (drawn(3), drawn(3).exp())
AFFINE = {
    "affine": (drawn(3), drawn(3)),
    "no bias": (drawn(3), None),
    "no weight": (None, drawn(3)),
    "plain": (None,) * 2,
}


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("affine", AFFINE)
def test_value_and_derivatives_are_those_of_batch_norm(shape: tuple[int, ...], affine: str) -> None:
    x = drawn(*shape).requires_grad_()
    moving = [t.clone().requires_grad_() for t in AFFINE[affine] if t is not None]

    def normalised(x: Tensor, *given: Tensor) -> Tensor:
        parts = iter(given)
        weight, bias = (None if t is None else next(parts) for t in AFFINE[affine])
        return F.batch_norm(x, *STATISTICS, weight, bias, False, 0.1, eps=0.01)

    want = normalised(x, *moving)
    with AffineNorm():
        found = normalised(x, *moving)
        assert torch.autograd.gradcheck(normalised, (x, *moving))
        assert torch.autograd.gradgradcheck(normalised, (x, *moving))
    assert "Addcmul" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-13)


def test_batch_statistics_and_mixed_precision_are_left_to_torch() -> None:
    x, half = drawn(6, 3), drawn(6, 3).float()
    given = [(x, None, None, None, None, True), (x, *STATISTICS, None, None, True), (half, *STATISTICS)]
    for i, arguments in enumerate(given):
        own = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        try:
            want = F.batch_norm(*arguments)
        except RuntimeError:
            with AffineNorm(), pytest.raises(RuntimeError):
                F.batch_norm(*own)
            continue
        with AffineNorm():
            assert torch.equal(F.batch_norm(*own), want), i
        assert not isinstance(own[1], Tensor) or torch.equal(own[1], arguments[1])


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("retain", [True, False])
def test_hessian_products_run_no_batch_norm_kernel(retain: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    batches = [(drawn(8, 4).float(), torch.arange(8) % 3)]
    with HessianOperator(model, batches, retain=retain) as operator, _Seen() as seen:
        operator.matvec(torch.ones(operator.dimension))
    assert "aten::mul.Tensor" in seen.names
    assert not any("batch_norm" in name for name in seen.names)
