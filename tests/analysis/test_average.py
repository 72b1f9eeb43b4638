"""Average-case sharpness against quadratics, where it is exact, and against the trace of the Hessian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.average import average_sharpness
from masks.errors import InputError, MaskError
from masks.mask import Mask, Provenance
from masks.params import ParamTable
from sam.perturbation import Elementwise, Layerwise

DIM = 30


class Quadratic(nn.Module):
    """With :func:`half_square`: loss of example x = 0.5 (w - x)^T A (w - x)."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        root = torch.randn(DIM, DIM, generator=g, dtype=torch.float64)
        self.w = nn.Parameter(torch.randn(DIM, generator=g, dtype=torch.float64).to(dtype))
        self.register_buffer("a", (root @ root.T / DIM).to(dtype))
        self.visited: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.visited.append(self.w.detach().clone())
        r = self.w - x
        return torch.stack([r, r @ self.a])


def half_square(out: Tensor, _: Tensor) -> Tensor:
    return 0.5 * (out[0] * out[1]).sum(1)


def data(sizes: tuple[int, ...] = (4, 4, 2)) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [(part, torch.zeros(len(part))) for part in x.split(sizes)]


METRICS = {
    "plain": (None, lambda w: torch.ones_like(w)),
    "elementwise": (Elementwise(0.0, "adaptive"), torch.abs),
    "floor": (Elementwise(0.5, "adaptive"), lambda w: w.abs() + 0.5),
    "layerwise": (Layerwise(), lambda w: torch.full_like(w, float(w.norm()))),
}


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("density", [0.07, 0.5, 1.0])
def test_expectation_on_a_quadratic_is_the_trace(name, noise, density):
    """Exactly rho^2 / 2 tr(C A C), a third of it for uniform noise, within the stated error of 2,000 pairs."""
    metric, scale = METRICS[name]
    model = Quadratic()
    keep = torch.zeros(DIM, dtype=torch.bool)
    keep[torch.arange(1, DIM, round(1 / density))] = True
    keep = keep if density < 1 else torch.ones(DIM, dtype=torch.bool)
    mask = Mask(ParamTable.from_model(model), (keep,)) if density < 1 else None
    got = average_sharpness(
        model, data((10,)), rho=0.7, noise=noise, metric=metric, pairs=2000, mask=mask, loss=half_square
    )
    w = model.w.detach()
    c = scale(w) * keep
    want = 0.5 * 0.7**2 * float((c**2 * model.a.diag()).sum()) / (1 if noise == "gaussian" else 3)
    assert abs(got.value - want) < 4 * got.standard_error
    assert got.standard_error < 0.06 * want
    moved = torch.stack(model.visited) != w
    assert not moved[:, ~keep].any()
    assert got.n == 2000


def test_value_and_error_are_those_of_the_points_visited():
    """Uneven batches, each example with the same weight; every second point is the mirror image of the first."""
    model, batches = Quadratic(), data((4, 4, 2))
    got = average_sharpness(model, batches, rho=0.7, pairs=3, loss=half_square)
    w = model.w.detach()
    eps = torch.stack(model.visited[6:]) - w  # after the two passes over each batch that must agree
    per_batch = eps.view(3, 7, DIM)
    assert not per_batch[:, 0].any()
    plus, minus = per_batch[:, 1::2], per_batch[:, 2::2]
    torch.testing.assert_close(plus, -minus)
    rises = 0.5 * torch.einsum("bpi,ij,bpj->bp", plus, model.a, plus)
    weights = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    assert got.value == pytest.approx(float(weights @ rises.mean(1)), rel=1e-9)
    assert got.standard_error == pytest.approx(float((weights**2 @ rises.var(1) / 3).sqrt()), rel=1e-9)
    assert got.n == 9
    # No noise twice.
    assert len({tuple(row.tolist()) for row in plus.reshape(-1, DIM)}) == 9


def test_uniform_noise_is_within_its_width_and_fills_it():
    model = Quadratic()
    average_sharpness(model, data(), rho=0.7, noise="uniform", pairs=50, loss=half_square)
    eps = torch.stack(model.visited) - model.w.detach()
    assert 0.69 < float(eps.max()) <= 0.7000001
    assert -0.7000001 <= float(eps.min()) < -0.69


def test_standard_error_is_calibrated():
    found = [
        average_sharpness(Quadratic(), data(), rho=0.5, pairs=6, seed=seed, loss=half_square) for seed in range(300)
    ]
    spread = np.std([f.value for f in found], ddof=1)
    stated = math.sqrt(np.mean([f.standard_error**2 for f in found]))
    assert stated == pytest.approx(spread, rel=0.15)


def test_on_a_network_it_is_the_trace_of_the_dense_hessian(case):
    w = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    rows = torch.cat([torch.full((row.numel,), row.is_norm) for row in ParamTable.from_model(case.model)])
    table = ParamTable.from_model(case.model)
    norm = Mask(table, tuple(row.is_norm for row in table), Provenance("norm")) if rows.any() else None
    for metric, c, mask in [
        (None, torch.ones_like(w), None),
        (Elementwise(0.0, "adaptive"), w.abs(), None),
        (None, rows.double() if norm is not None else torch.ones_like(w), norm),
    ]:
        # So small a radius that no ReLU of these examples switches.
        want = 0.5 * 1e-6**2 * float((c**2 * case.hessian.diag()).sum())
        got = average_sharpness(case.model, [(case.x, case.y)], rho=1e-6, metric=metric, pairs=100, mask=mask)
        assert abs(got.value - want) < 4 * got.standard_error + 0.01 * abs(want)
        assert got.standard_error < 0.1 * abs(want)


def test_kinks_of_relu_add_a_term_of_the_same_order_as_the_trace(case):
    """What the docstring warns of; a smooth network has none."""
    want = 0.5 * 1e-3**2 * float(case.hessian.trace())
    got = average_sharpness(case.model, [(case.x, case.y)], rho=1e-3, pairs=100)
    if case.name == "vit":
        assert abs(got.value - want) < 4 * got.standard_error
    else:
        assert got.value > 1.3 * want


def test_same_noise_whatever_mask_layout_and_precision():
    full, part, single = Quadratic(), Quadratic(), Quadratic(torch.float32)
    for density in (0.05, 0.6):
        keep = torch.zeros(DIM, dtype=torch.bool)
        keep[: max(1, int(density * DIM))] = True
        for model in (full, part, single):
            model.visited.clear()
        average_sharpness(full, data(), rho=0.3, pairs=2, seed=4, loss=half_square)
        average_sharpness(
            part, data(), rho=0.3, pairs=2, seed=4, mask=Mask(ParamTable.from_model(part), (keep,)), loss=half_square
        )
        average_sharpness(single, data(), rho=0.3, pairs=2, seed=4, loss=half_square)
        torch.testing.assert_close(torch.stack(part.visited)[:, keep], torch.stack(full.visited)[:, keep])
        torch.testing.assert_close(torch.stack(single.visited).double(), torch.stack(full.visited), rtol=0, atol=1e-6)


def test_channels_last_weights_meet_the_same_noise(conv_case):
    plain = average_sharpness(conv_case.fresh(), conv_case.batches, rho=0.05, pairs=2)
    other = average_sharpness(
        conv_case.fresh().to(memory_format=torch.channels_last), conv_case.batches, rho=0.05, pairs=2
    )
    assert other.value == pytest.approx(plain.value, rel=1e-9)


def test_deterministic_given_the_seed(conv_case):
    torch.manual_seed(5)
    one = average_sharpness(conv_case.model, conv_case.batches, rho=0.05, pairs=2, seed=3)
    torch.manual_seed(6)
    assert average_sharpness(conv_case.model, conv_case.batches, rho=0.05, pairs=2, seed=3) == one
    assert average_sharpness(conv_case.model, conv_case.batches, rho=0.05, pairs=2, seed=4).value != one.value
    assert average_sharpness(conv_case.model, conv_case.batches, rho=0.05, pairs=1).standard_error is None


def test_invariant_to_relu_rescaling_and_logit_scale():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 6, generator=g, dtype=torch.float64), torch.randint(3, (12,), generator=g)
    nets = [nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double() for _ in range(2)]
    k = torch.linspace(0.1, 10, 9, dtype=torch.float64)
    with torch.no_grad():
        nets[1].load_state_dict(nets[0].state_dict())
        nets[1][0].weight.mul_(k[:, None])
        nets[1][0].bias.mul_(k)
        nets[1][2].weight.div_(k).mul_(3)
        nets[1][2].bias.mul_(3)
    adaptive = Elementwise(0.0, "adaptive")
    one, two = (average_sharpness(net, [(x, y)], rho=0.2, metric=adaptive, normalise_logits=True).value for net in nets)
    assert two == pytest.approx(one, rel=1e-9)
    one, two = (average_sharpness(net, [(x, y)], rho=0.2, normalise_logits=True).value for net in nets)
    assert two != pytest.approx(one, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_is_left_untouched(case, dtype, snapshot):
    model = case.fresh(dtype).train()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = -0.0
    table = ParamTable.from_model(model)
    before = snapshot(model)
    for mask in (None, Mask(table, tuple(torch.rand(row.shape, generator=torch.Generator()) < 0.5 for row in table))):
        average_sharpness(model, case.batches, rho=1.0, pairs=2, mask=mask)
        before.check()


def test_weights_come_back_after_an_exception(conv_case, snapshot):
    model, calls = conv_case.fresh().train(), []
    before = snapshot(model)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, targets, reduction="none")

    with pytest.raises(KeyboardInterrupt):
        average_sharpness(model, conv_case.batches, rho=0.1, loss=loss)
    before.check()


def test_unusable_input_is_refused(conv_case):
    model, batches = conv_case.model, conv_case.batches
    table = ParamTable.from_model(model)
    for change, text in [
        ({"rho": 0.0}, "rho must be a positive finite number"),
        ({"rho": math.nan}, "rho must be"),
        ({"pairs": 0}, "pairs at least 1, got rho=0.1 and pairs=0"),
        ({"noise": "gausian"}, "unknown noise 'gausian'; did you mean gaussian"),
        ({"mask": Mask(table, (False,) * len(table))}, "keeps no coordinate"),
        ({"rho": 1e200}, r"loss is not finite .* at noise of size 1e\+200"),
    ]:
        with pytest.raises(InputError, match=text):
            average_sharpness(model, batches, **{"rho": 0.1, **change})
    with pytest.raises(MaskError):
        average_sharpness(model, batches, rho=0.1, mask=Mask(ParamTable.from_model(nn.Linear(2, 2)), (True, True)))
    noisy = nn.Sequential(nn.Flatten(), nn.Linear(64, 5).double())
    noisy.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
    with pytest.raises(InputError, match="data that differ between passes"):
        average_sharpness(noisy, batches, rho=0.1)


def test_name_says_the_metric_in_full(conv_case):
    got = average_sharpness(
        conv_case.model, conv_case.batches, rho=0.05, pairs=2, metric=Elementwise(0.0), normalise_logits=True
    )
    assert got.name == (
        "average-case sharpness, gaussian Elementwise(eta=0.0, bias='identity'), rho=0.05, 2 antithetic pairs per "
        "batch, all parameters, evaluation-mode normalization, normalised logits"
    )
