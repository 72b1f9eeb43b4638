"""The registry of metrics, and the metrics of gradients and of one layer against closed forms and dense oracles."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import analysis.metrics as registry
from analysis import (
    PRIMARY,
    Estimate,
    GaussNewtonOperator,
    HessianOperator,
    average_sharpness,
    eigenpairs,
    eigsh,
    evaluate,
    fisher_trace,
    gradient_norm,
    list_metrics,
    m_sharpness,
    metric_info,
    moments,
    register_metric,
    relative_flatness,
    spectral_density,
    xtrace,
)
from analysis.examples import data_digest
from masks.context import cross_entropy
from masks.errors import InputError, MaskError
from masks.mask import Mask, Provenance
from masks.params import ParamTable
from masks.per_example import per_example_gradients
from sam.perturbation import Elementwise, Rule

ADAPTIVE = Elementwise(0.0, "adaptive")


def flat_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    twin = model.eval()
    grads = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
    return torch.cat([g.flatten() for g in grads])


def every_third(model: nn.Module) -> tuple[Mask, Tensor]:
    table = ParamTable.from_model(model)
    keep = (torch.arange(table.numel) % 3 == 0) | (torch.arange(table.numel) < table.rows[0].numel)
    parts = tuple(p.view(r.shape) for p, r in zip(keep.split([r.numel for r in table]), table, strict=True))
    return Mask(table, parts), keep


# -- gradients ------------------------------------------------------------------------------------------------------


def test_gradient_norms_against_one_gradient(case):
    g = flat_gradient(case.fresh(), case.x, case.y)
    w = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    mask, keep = every_third(case.model)
    for metric, c in [(None, torch.ones_like(w)), (ADAPTIVE, w.abs())]:
        got = gradient_norm(case.model, case.batches, metric=metric)
        assert got.value == pytest.approx(float((c * g).norm()), rel=1e-8)
        assert (got.standard_error, got.n) == (None, 150)
        got = gradient_norm(case.model, case.batches, metric=metric, mask=mask)
        assert got.value == pytest.approx(float((c * g)[keep].norm()), rel=1e-8)


def softmax_regression(seed: int = 0, n: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    model = nn.Linear(6, 4).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model, torch.randn(n, 6, generator=g, dtype=torch.float64), torch.randint(4, (n,), generator=g)


def closed_form(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """||grad||^2 = ||p - e_y||^2 (||x||^2 + 1) for every example and label, (N, classes), and p."""
    p = model(x).softmax(1).detach()
    distance = p.square().sum(1, keepdim=True) - 2 * p + 1
    return distance * (x.square().sum(1, keepdim=True) + 1), p


def test_empirical_fisher_trace_of_softmax_regression():
    model, x, y = softmax_regression()
    squares, _ = closed_form(model, x)
    want = squares.gather(1, y[:, None]).squeeze(1)
    got = fisher_trace(model, [(x[:30], y[:30]), (x[30:], y[30:])])
    assert got.value == pytest.approx(float(want.mean()), rel=1e-12)
    assert got.standard_error == pytest.approx(float(want.std()) / math.sqrt(40), rel=1e-12)
    assert got.n == 40


def test_true_fisher_trace_of_softmax_regression():
    """Unbiased over seeds, and equal to the trace of the Gauss-Newton matrix, here the Hessian."""
    model, x, y = softmax_regression()
    squares, p = closed_form(model, x)
    want = float((p * squares).sum(1).mean())
    found = [fisher_trace(model, [(x, y)], labels="model", seed=seed) for seed in range(200)]
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    assert abs(float(values.mean()) - want) < 4 * float(values.std()) / math.sqrt(200)
    assert float(values.std()) < 0.2 * want
    flat = [q.detach().clone() for q in model.parameters()]
    hessian = torch.autograd.functional.hessian(
        lambda w, b: F.cross_entropy(x @ w.T + b, y), tuple(flat), vectorize=True
    )
    trace = sum(float(hessian[i][i].reshape(q.numel(), q.numel()).trace()) for i, q in enumerate(flat))
    assert want == pytest.approx(trace, rel=1e-9)
    assert fisher_trace(model, [(x, y)], labels="model", seed=3) == found[3]
    empirical = fisher_trace(model, [(x, y)]).value
    assert abs(empirical - want) > 0.2 * want  # the two are told apart


@pytest.mark.parametrize("masked", [False, True])
def test_fisher_trace_against_a_loop_over_examples(case, masked):
    mask, keep = every_third(case.model)
    model = case.fresh()
    rows = torch.stack([flat_gradient(model, case.x[i : i + 1], case.y[i : i + 1]) for i in range(len(case.x))])
    want = (rows * keep if masked else rows).square().sum(1)
    got = fisher_trace(case.model, case.batches, mask=mask if masked else None)
    assert got.value == pytest.approx(float(want.mean()), rel=1e-9)
    assert got.standard_error == pytest.approx(float(want.std()) / math.sqrt(150), rel=1e-9)


def test_the_frozen_part_of_a_fisher_trace_makes_no_graph(case):
    model = case.fresh()
    named = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    for gradients in per_example_gradients(model.eval(), named, cross_entropy, case.x[:5], case.y[:5]):
        assert not any(g.requires_grad for g in gradients)
        assert any(bool(g.any()) for g in gradients)


@pytest.mark.filterwarnings("ignore::masks.OneByOneWarning")
def test_fisher_trace_where_vmap_cannot_run_the_model():
    model, x, y = softmax_regression()

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.sum()) > -1e9 else x

    got, want = fisher_trace(Branch(), [(x, y)]), fisher_trace(model, [(x, y)])
    assert (got.value, got.n) == (pytest.approx(want.value, rel=1e-12), 40)


def test_chunks_of_examples_do_not_matter(case, monkeypatch):
    want = fisher_trace(case.model, case.batches)
    monkeypatch.setattr("analysis.gradients._CHUNK_BYTES", 8 * 609 * 7)
    assert fisher_trace(case.model, case.batches).value == pytest.approx(want.value, rel=1e-12)


# -- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["last", "first"])
def test_relative_flatness_against_the_dense_block(case, which):
    """sum over pairs of rows of <w_s, w_s'> tr(H_{s,s'}), block by block as it is defined."""
    table = ParamTable.from_model(case.model)
    i = max(i for i, r in enumerate(table) if len(r.shape) == 2) if which == "last" else 0
    i = next(i for i, r in enumerate(table) if len(r.shape) >= 2 and r.role == "weight") if which == "first" else i
    row = table.rows[i]
    w = table.tensors(case.model)[i].detach().flatten(1)
    start, d = table.offsets[i], w.shape[1]
    block = case.hessian[start : start + row.numel, start : start + row.numel]
    want = sum(
        float(w[s] @ w[t]) * float(block[s * d : (s + 1) * d, t * d : (t + 1) * d].trace())
        for s in range(len(w))
        for t in range(len(w))
    )
    got = relative_flatness(case.model, case.batches, layer=None if which == "last" else row.name, draws=150)
    assert abs(got.value - want) < 4 * got.standard_error
    assert got.standard_error < 0.3 * abs(want)
    assert got.settings["layer"] == row.name
    assert (got.n, got.settings["num_examples"]) == (150, 150)


def test_relative_flatness_is_calibrated_and_deterministic():
    model, x, y = softmax_regression()
    found = [relative_flatness(model, [(x, y)], draws=20, seed=seed) for seed in range(200)]
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    stated = math.sqrt(sum(f.standard_error**2 for f in found) / len(found))
    assert stated == pytest.approx(float(values.std()), rel=0.2)
    assert relative_flatness(model, [(x, y)], draws=20, seed=7) == found[7]


# -- the registry ---------------------------------------------------------------------------------------------------


def relu_net(scale: Tensor | float = 1.0, logits: float = 1.0) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
        net[0].weight.mul_(torch.as_tensor(scale).expand(9)[:, None])
        net[0].bias.mul_(scale)
        net[2].weight.div_(scale).mul_(logits)
        net[2].bias.mul_(logits)
    return net


CHANGES = {
    "neuron_rescaling": lambda: relu_net(torch.linspace(0.2, 5, 9, dtype=torch.float64)),
    "layer_rescaling": lambda: relu_net(3.0),
    "logit_scale": lambda: relu_net(logits=3.0),
}


@pytest.mark.parametrize("name", [info.name for info in list_metrics()])
def test_every_metric_has_the_invariances_it_states_and_no_other(name):
    info = metric_info(name)
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(12, 6, generator=g, dtype=torch.float64), torch.randint(3, (12,), generator=g))]
    settings = {"m": 6, "pairs": 3, "draws": 500}
    full = f"{name}@middle" if info.grid else name
    (base,) = evaluate(relu_net(), batches, [full], **settings).values()
    for change, changed in CHANGES.items():
        (got,) = evaluate(changed(), batches, [full], **settings).values()
        if change in info.invariances:
            # lambda_max and relative flatness are estimates; the latter meets the same signs.
            assert got.value == pytest.approx(base.value, rel=1e-6), change
        else:
            assert got.value != pytest.approx(base.value, rel=1e-3), change
    assert info.summary
    assert info.source
    assert info.cost > 0


def test_curvature_metrics_are_those_of_the_dense_matrices(case):
    """Each against the dense Hessian or Gauss-Newton matrix, exactly or within four standard errors."""
    names = ["lambda_max", "lambda_5", "lambda_max_adaptive", "lambda_max_gauss_newton"]
    got = evaluate(case.model, case.batches, [*names, "trace", "frobenius_norm", "effective_rank"], seed=1)
    h = case.hessian
    c = torch.cat([p.detach().flatten() for p in case.model.parameters()]).abs()
    values = torch.linalg.eigvalsh(h)
    with GaussNewtonOperator(case.model, case.batches) as operator:
        newton = torch.stack([operator.matvec(v) for v in torch.eye(operator.dimension, dtype=torch.float64)])
    want = [values[-1], values[-5], *(torch.linalg.eigvalsh(a)[-1] for a in (c[:, None] * h * c, newton))]
    for name, value in zip(names, want, strict=True):
        assert abs(got[name].value - float(value)) <= got[name].settings["residual"], name
        assert got[name].settings["converged"]
    assert got["lambda_5"].settings["complete"]
    assert got["lambda_max_adaptive"].settings["scale"] == "abs"
    trace, square = float(values.sum()), float((values**2).sum())
    for name, value in {
        "trace": trace,
        "frobenius_norm": math.sqrt(square),
        "effective_rank": trace**2 / square,
    }.items():
        assert abs(got[name].value - value) < 4 * got[name].standard_error, name
        assert got[name].standard_error < 0.2 * abs(value)
    for name, one in got.items():
        assert one.settings["data_digest"] == data_digest(case.batches), name
        assert one.settings["mask_digest"], name
        assert one.settings["seed"] == 1


def test_eigenvalues_and_traces_say_what_they_are_of(conv_case):
    with HessianOperator(conv_case.model, conv_case.batches) as operator:
        top = eigenpairs(operator, 2, seed=3).largest[0]
        for one in (
            top,
            eigsh(operator, 2).largest[0],
            moments(operator, num_probes=2).trace,
            xtrace(operator, num_products=4),
        ):
            assert one.settings["data_digest"] == data_digest(conv_case.batches)
            assert (one.settings["num_examples"], one.settings["dtype"]) == (150, "float64")
        assert (top.n, top.settings["seed"], top.settings["statistics"]) == (150, 3, "evaluation")
        density = spectral_density(operator, num_vectors=1, num_steps=3).moment(1)
        assert density.settings["data_digest"] == top.settings["data_digest"]


def test_the_digest_does_not_see_how_data_are_cut_but_what_they_are():
    x, y = torch.arange(12.0).view(6, 2), torch.arange(6)
    whole = data_digest([(x, y)])
    assert data_digest([(x[:4], y[:4]), (x[4:], y[4:])]) == whole
    assert data_digest([(x.double(), y)]) != whole
    assert data_digest([(x[:, None], y)]) != whole
    assert data_digest([(x[:4], y[:4]), (x[4:, :1], y[4:])]) != whole  # examples of two shapes have one, too


def test_names_and_values_are_those_of_the_functions(case):
    names = [PRIMARY, "one_step_l2@0.05", "lambda_max", "average_uniform@0.1", "gradient_norm"]
    seen = []
    got = evaluate(case.model, case.batches, names, m=50, seed=3, on_result=lambda n, e: seen.append((n, e)))
    assert list(got) == names
    assert seen == list(got.items())
    want = m_sharpness(
        case.model,
        case.batches,
        m=50,
        rho=0.002,
        rule=Rule(ADAPTIVE, math.inf),
        method="apgd",
        steps=20,
        normalise_logits=True,
    )
    assert got[PRIMARY] == want
    assert got["one_step_l2@0.05"] == m_sharpness(case.model, case.batches, m=50, rho=0.05, rule=Rule())
    assert got["average_uniform@0.1"] == average_sharpness(case.model, case.batches, rho=0.1, noise="uniform", seed=3)
    top = got["lambda_max"]
    assert abs(top.value - float(torch.linalg.eigvalsh(case.hessian)[-1])) <= top.settings["residual"]
    assert top.settings["converged"]
    assert len({e.settings["data_digest"] for e in got.values()}) == 1
    assert all(isinstance(e, Estimate) and "error_kind" in e.settings for e in got.values())


def test_primary_metric_is_the_one_named_beforehand():
    name, _, rho = PRIMARY.partition("@")
    info = metric_info(name)
    assert float(rho) == info.middle == sorted(info.grid)[len(info.grid) // 2]
    assert set(info.invariances) == {"neuron_rescaling", "layer_rescaling", "logit_scale"}
    assert registry.MetricContext(nn.Linear(1, 1), []).m == 128


def test_a_name_alone_is_the_whole_grid():
    assert registry.resolve(["one_step_l2", "one_step_l2@0.5", "lambda_max"]) == [
        "one_step_l2@0.125",
        "one_step_l2@0.25",
        "one_step_l2@0.5",
        "one_step_l2@1.0",
        "one_step_l2@2.0",
        "lambda_max",
    ]
    assert registry.resolve(["one_step_l2@middle", "one_step_l2@1e-3", "one_step_l2@5e-1"]) == [
        "one_step_l2@0.5",
        "one_step_l2@0.001",
    ]


def test_mask_and_radius_convention_reach_the_metric(case):
    mask, _ = every_third(case.model)
    got = evaluate(case.model, case.batches, ["one_step_l2@0.05", "lambda_max"], mask=mask, m=50, radius="rms")
    want = m_sharpness(case.model, case.batches, m=50, rho=0.05, rule=Rule(), mask=mask, radius="rms")
    assert got["one_step_l2@0.05"] == want
    assert got["lambda_max"].settings["num_kept"] == mask.num_kept
    with pytest.raises(InputError, match="relative_flatness does not apply to a mask"):
        evaluate(case.model, case.batches, ["relative_flatness"], mask=mask)


def test_a_metric_of_ones_own(conv_case, monkeypatch):
    monkeypatch.setattr(registry, "_metrics", dict(registry._metrics))

    @register_metric("weight_norm", direction="flatter", source="here", cost=0.0, grid=(0.1, 0.2, 0.3))
    def weight_norm(context: registry.MetricContext, rho: float) -> Estimate:
        """norm of the weights"""
        norm = float(torch.cat([p.detach().flatten() for p in context.model.parameters()]).norm())
        return Estimate("weight norm", rho * norm, None, 1, {})

    assert metric_info("weight_norm").summary == "norm of the weights"
    got = evaluate(conv_case.model, conv_case.batches, ["weight_norm"])
    assert list(got) == ["weight_norm@0.1", "weight_norm@0.2", "weight_norm@0.3"]
    for change, text in [
        ({}, "'weight_norm' is already registered"),
        ({"name": "a,b"}, "must not be empty or hold"),
        ({"name": ""}, "must not be empty or hold"),
        ({"direction": "sharp"}, "did you mean sharper"),
        ({"invariances": ["logit_scal"]}, "did you mean logit_scale"),
        ({"grid": (0.1, 0.2)}, "odd number of ascending positive radii"),
        ({"grid": (0.3, 0.2, 0.1)}, "odd number of ascending positive radii"),
        ({"grid": (-0.1,)}, "odd number of ascending positive radii"),
    ]:
        settings = {"name": "weight_norm", "direction": "flatter", "source": "here", "cost": 1.0, **change}
        with pytest.raises(InputError, match=text):
            register_metric(settings.pop("name"), **settings)(weight_norm)


def test_unusable_input_is_refused_before_anything_is_measured(conv_case):
    model, batches = conv_case.model, conv_case.batches
    seen = []
    for names, settings, text in [
        (["gradient_norm", "lamda_max"], {}, "unknown metric 'lamda_max'; did you mean lambda_max"),
        ([], {}, "non-empty list of metrics"),
        ("lambda_max", {}, "non-empty list of metrics"),
        (["gradient_norm", "lambda_max@0.1"], {}, "lambda_max takes no radius"),
        (["gradient_norm", "one_step_l2@-1"], {}, "must be a positive number or 'middle', got '-1'"),
        (["gradient_norm", "one_step_l2@"], {}, "must be a positive number"),
        (["gradient_norm", "one_step_l2@nan"], {}, "must be a positive number"),
        (["gradient_norm"], {"sed": 1}, "unknown setting 'sed'; did you mean seed"),
    ]:
        with pytest.raises(InputError, match=text) as error:
            evaluate(model, batches, names, on_result=lambda *a: seen.append(a), **settings)
        assert "\n" not in str(error.value)
    assert not seen


def test_what_was_measured_is_kept_when_a_later_metric_fails(conv_case):
    kept = {}
    with pytest.raises(InputError, match="m=999 needs at least 999 examples"):
        evaluate(conv_case.model, conv_case.batches, ["gradient_norm", PRIMARY], m=999, on_result=kept.__setitem__)
    assert list(kept) == ["gradient_norm"]


FUNCTIONS = {
    "gradient_norm": gradient_norm,
    "fisher data": fisher_trace,
    "fisher model": lambda *a, **k: fisher_trace(*a, labels="model", **k),
    "relative_flatness": lambda *a, **k: relative_flatness(*a, draws=3, **k),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_model_is_left_untouched_and_bad_models_are_refused(case, name, snapshot):
    model = case.fresh().train()
    for p in list(model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    before = snapshot(model)
    FUNCTIONS[name](model, case.batches)
    before.check()
    flat = [(case.x.flatten(1), case.y)]
    noisy = nn.Sequential(nn.Linear(64, 5).double())
    noisy.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
    before = snapshot(noisy)
    with pytest.raises(InputError, match=r"data that differ between passes|draws random numbers"):
        FUNCTIONS[name](noisy, flat)
    before.check()
    blind = nn.Sequential(nn.Linear(64, 5).double())
    blind.register_forward_hook(lambda _, __, out: out.detach())
    with pytest.raises(InputError, match="does not depend on any trainable parameter"):
        FUNCTIONS[name](blind, flat)
    broken = nn.Sequential(nn.Linear(64, 5).double())
    nn.init.constant_(broken[0].weight, math.nan)
    with pytest.raises(InputError, match="loss is not finite for 150 of 150 examples"):
        FUNCTIONS[name](broken, flat)


def test_errors_of_single_metrics(conv_case):
    model, batches = conv_case.model, conv_case.batches
    table = ParamTable.from_model(model)
    empty = Mask(table, (False,) * len(table), Provenance("none"))
    with pytest.raises(InputError, match="unknown labels 'dat'; did you mean data"):
        fisher_trace(model, batches, labels="dat")
    with pytest.raises(InputError, match="keeps no coordinate"):
        fisher_trace(model, batches, mask=empty)
    with pytest.raises(InputError, match="keeps no coordinate"):
        gradient_norm(model, batches, mask=empty)
    with pytest.raises(InputError, match="the true Fisher needs outputs of shape"):
        fisher_trace(
            nn.Linear(3, 1).double(), [(torch.ones(2, 3), torch.ones(2))], labels="model", loss=lambda o, _: o[:, 0]
        )
    with pytest.raises(InputError, match=r"needs a matrix of weights; bn1\.weight has shape \(6,\)"):
        relative_flatness(model, batches, layer="bn1.weight")
    with pytest.raises(MaskError, match=r"did you mean head\.weight"):
        relative_flatness(model, batches, layer="head.weigth")
    with pytest.raises(InputError, match="draws must be at least 1"):
        relative_flatness(model, batches, draws=0)
    with pytest.raises(InputError, match="no matrix of weights"):
        relative_flatness(nn.Sequential(nn.LayerNorm(4)), [(torch.ones(2, 4), torch.tensor([0, 1]))])
