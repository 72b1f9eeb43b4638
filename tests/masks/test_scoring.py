"""Gradients and Fisher diagonals, against closed forms, differences and loops by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from masks import (
    Batch,
    Budget,
    MaskContext,
    MaskError,
    OneByOneWarning,
    build_mask,
    cross_entropy,
    per_example,
    scoring,
    top_k,
)
from masks.builders.gradient import score_gradient, score_snip
from masks.scoring import mean_gradient, mean_squared_gradients


def data(sizes: tuple[int, ...], shape: tuple[int, ...], classes: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, *shape, generator=generator, dtype=torch.float64),
            torch.randint(classes, (n,), generator=generator),
        )
        for n in sizes
    ]


def joined(batches: list[Batch]) -> Batch:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def assert_all_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# -- softmax regression: closed forms --------------------------------------------------------------------------


@pytest.fixture
def regression() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def test_empirical_fisher_of_softmax_regression(regression: nn.Linear) -> None:
    batches = data((7, 5, 2), (4,), 3)
    x, y = joined(batches)
    residual = regression(x).softmax(1) - nn.functional.one_hot(y, 3)
    weight = torch.einsum("nc,nd->cd", residual**2, x**2) / 14
    found = mean_squared_gradients(MaskContext(regression, batches=batches), "data")
    assert_all_close(found, [weight.detach(), (residual**2).mean(0).detach()])


def test_mean_gradient_of_softmax_regression(regression: nn.Linear) -> None:
    batches = data((7, 5, 2), (4,), 3)
    x, y = joined(batches)
    residual = regression(x).softmax(1) - nn.functional.one_hot(y, 3)
    found = mean_gradient(MaskContext(regression, batches=batches))
    assert_all_close(found, [(residual.T @ x / 14).detach(), residual.mean(0).detach()])


def test_true_fisher_of_softmax_regression(regression: nn.Linear) -> None:
    """E over labels of (p_c - [l = c])^2 is p_c (1 - p_c); sampled labels agree within their standard error."""
    batches = data((4_000,) * 5, (4,), 3)
    x, _ = joined(batches)
    p = regression(x).detach().softmax(1)
    # Variance of the square s: it is (1 - p)^2 with probability p, else p^2.
    variance = p * (1 - p) ** 4 + (1 - p) * p**4 - (p * (1 - p)) ** 2
    expected = [torch.einsum("nc,nd->cd", p * (1 - p), x**2) / len(x), (p * (1 - p)).mean(0)]
    error = [torch.einsum("nc,nd->cd", variance, x**4).sqrt() / len(x), variance.sum(0).sqrt() / len(x)]
    found = mean_squared_gradients(MaskContext(regression, batches=batches), "model")
    for f, e, s in zip(found, expected, error, strict=True):
        assert ((f - e).abs() < 4 * s).all()
        assert (s < 0.05 * e).all()
    # The labels of the data are no draws from this model, and it shows.
    empirical = mean_squared_gradients(MaskContext(regression, batches=batches), "data")
    assert ((empirical[0] - expected[0]).abs() > 6 * error[0]).any()


def test_sampled_labels_follow_the_seed_only(regression: nn.Linear) -> None:
    batches = data((50, 50), (4,), 3)
    first = mean_squared_gradients(MaskContext(regression, batches=batches, seed=1), "model")
    torch.manual_seed(5)
    again = mean_squared_gradients(MaskContext(regression, batches=batches, seed=1), "model")
    other = mean_squared_gradients(MaskContext(regression, batches=batches, seed=2), "model")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


# -- other models: loops and differences by hand ------------------------------------------------------------------


class Branching(nn.Module):
    """Looks at its input, which vmap cannot."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y if x.sum().item() < 1e9 else -y


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    model.register_parameter("unused", nn.Parameter(torch.randn(2)))
    return model


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    return model


MODELS: list[Callable[[], nn.Module]] = [tied, convolutional, partly_frozen]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param().double()  # type: ignore[no-any-return]


@pytest.fixture
def vmapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of examples in every call of vmap that succeeded."""
    done: list[int] = []
    original = per_example.vmap

    def counting(*args: object, **kwargs: object) -> Callable[..., object]:
        inner = original(*args, **kwargs)  # type: ignore[arg-type]

        def call(values: object, x: Tensor, y: Tensor) -> object:
            out = inner(values, x, y)
            done.append(len(x))
            return out

        return call

    monkeypatch.setattr(per_example, "vmap", counting)
    return done


def squared_by_hand(context: MaskContext) -> list[Tensor]:
    twin = context.scoring_model()
    params = [p for p in twin.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in params]
    x, y = joined(list(context.batches))
    for i in range(len(x)):
        loss = cross_entropy(twin(x[i : i + 1]), y[i : i + 1])[0]
        for t, g in zip(total, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
            if g is not None:
                t += g**2
    return [(t / len(x)).detach() for t in total]


@pytest.mark.filterwarnings("ignore::masks.OneByOneWarning")
def test_fisher_is_the_mean_of_squares_and_vmap_equals_the_loop(model: nn.Module, vmapped: list[int]) -> None:
    batches = data((8, 8, 3), (5,), 3)
    context = MaskContext(model, batches=batches)
    wanted = squared_by_hand(context)
    assert_all_close(mean_squared_gradients(context, "data"), wanted)
    assert vmapped == [8, 8, 3]
    vmapped.clear()
    assert_all_close(mean_squared_gradients(MaskContext(Branching(model), batches=batches), "data"), wanted)
    assert vmapped == []
    sampled = mean_squared_gradients(context, "model")
    assert_all_close(mean_squared_gradients(MaskContext(Branching(model), batches=batches), "model"), sampled)


def test_a_model_that_vmap_cannot_run_is_said_once(regression: nn.Linear) -> None:
    """With the model and the reason, whatever the number of batches and masks; and only where it costs something."""
    several = MaskContext(Branching(regression), batches=data((8, 8, 3), (4,), 3))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")  # Python's own choice
        for _ in range(2):
            build_mask("fisher", several, Budget(3, 15))
    (warning,) = found
    assert warning.category is OneByOneWarning
    assert "of Branching are computed one by one" in str(warning.message)
    assert "cannot run model and loss (RuntimeError: vmap: It looks like you're " in str(warning.message)
    assert len(str(warning.message)) < 500
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean_squared_gradients(MaskContext(Branching(regression), batches=data((1, 1), (4,), 3)), "data")
        mean_squared_gradients(MaskContext(regression, batches=data((8, 3), (4,), 3)), "data")
        with pytest.raises(MaskError, match="one value per example"):  # not a failure of vmap
            build_mask("fisher", MaskContext(regression, batches=data((6,), (4,), 3), loss=mean_loss), Budget(3, 15))


def test_fisher_in_chunks(model: nn.Module, vmapped: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    context = MaskContext(model, batches=data((8, 8, 3), (5,), 3))
    whole = mean_squared_gradients(context, "data")
    vmapped.clear()
    monkeypatch.setattr(scoring, "_CHUNK_BYTES", 3 * 8 * context.table.numel)
    assert_all_close(mean_squared_gradients(context, "data"), whole)
    assert vmapped == [3, 3, 2, 3, 3, 2, 3]
    monkeypatch.setattr(scoring, "_CHUNK_BYTES", 1)
    assert_all_close(mean_squared_gradients(context, "data"), whole)


def test_attention_is_vmapped(vmapped: list[int]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x, x, x, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    context = MaskContext(Attention().double(), batches=data((6, 2), (5, 4), 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where vmap runs an operation one example at a time
        found = mean_squared_gradients(context, "data")
    assert_all_close(found, squared_by_hand(context))
    assert vmapped == [6, 2]


def test_mean_gradient_is_that_of_differences(model: nn.Module) -> None:
    batches = data((8, 8, 3), (5,), 3)
    context = MaskContext(model, batches=batches)
    found = mean_gradient(context)
    twin = context.scoring_model()
    x, y = joined(batches)

    def loss() -> float:
        with torch.no_grad():
            return float(cross_entropy(twin(x), y).mean())

    checked = 0
    params = [p for p in twin.parameters() if p.requires_grad]
    for p, gradient in zip(params, found, strict=True):
        flat = p.detach().view(-1)
        for i in range(len(flat)):
            w, step = float(flat[i]), 1e-5
            flat[i] = w + step
            up = loss()
            flat[i] = w - step
            down = loss()
            flat[i] = w
            assert (up - down) / (2 * step) == pytest.approx(float(gradient.view(-1)[i]), rel=1e-5, abs=1e-8)
            checked += 1
    assert checked == context.table.numel


@pytest.mark.parametrize("make", [tied, partly_frozen])
def test_batches_do_not_matter_without_running_statistics(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double()
    batches = data((8, 8, 3), (5,), 3)
    parted, whole = MaskContext(model, batches=batches), MaskContext(model, batches=[joined(batches)])
    assert_all_close(mean_gradient(parted), mean_gradient(whole))
    assert_all_close(mean_squared_gradients(parted, "data"), mean_squared_gradients(whole, "data"))


def test_scores_do_not_depend_on_running_statistics_or_mode() -> None:
    torch.manual_seed(0)
    model = convolutional().double()
    batches = data((8, 8), (5,), 3)
    first = mean_gradient(MaskContext(model, batches=batches))
    model[2].running_mean.fill_(100.0)
    model[2].running_var.fill_(1e-3)
    model.eval()
    assert_all_close(mean_gradient(MaskContext(model, batches=batches)), first)


@pytest.mark.filterwarnings("ignore::masks.OneByOneWarning")
def test_scoring_under_no_grad(model: nn.Module) -> None:
    batches = data((8, 3), (5,), 3)
    wanted = mean_gradient(MaskContext(model, batches=batches))
    squares = mean_squared_gradients(MaskContext(model, batches=batches), "data")
    with torch.no_grad():
        assert_all_close(mean_gradient(MaskContext(model, batches=batches)), wanted)
        assert_all_close(mean_squared_gradients(MaskContext(model, batches=batches), "data"), squares)
        looped = mean_squared_gradients(MaskContext(Branching(model), batches=batches), "data")
    assert_all_close(looped, squares)
    assert not any(t.requires_grad for t in [*wanted, *squares, *looped])


@pytest.mark.filterwarnings("ignore::masks.OneByOneWarning")
def test_another_loss(regression: nn.Linear) -> None:
    def squares(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - nn.functional.one_hot(targets, 3)).square().sum(1)

    batches = data((6, 3), (4,), 3)
    x, y = joined(batches)
    error = 2 * (regression(x) - nn.functional.one_hot(y, 3)).detach()
    context = MaskContext(regression, batches=batches, loss=squares)
    assert_all_close(mean_gradient(context), [error.T @ x / 9, error.mean(0)])
    wanted = [torch.einsum("nc,nd->cd", error**2, x**2) / 9, (error**2).mean(0)]
    assert_all_close(mean_squared_gradients(context, "data"), wanted)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets).mean()


def loss_per_class(logits: Tensor, targets: Tensor) -> Tensor:
    return logits


def loss_of_the_first(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets)[:1]


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("gradient", mean_loss),
        ("gradient", loss_per_class),
        ("gradient", loss_of_the_first),
        ("fisher", mean_loss),
        ("fisher", loss_per_class),
    ],
)
def test_a_loss_must_be_per_example(regression: nn.Linear, name: str, loss: Callable[..., Tensor]) -> None:
    context = MaskContext(regression, batches=data((6,), (4,), 3), loss=loss)
    with pytest.raises(MaskError, match="one value per example"):
        build_mask(name, context, Budget(3, 15))


@pytest.mark.parametrize("builder", ["gradient", "snip", "fisher", "fisher:model"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_divergence_is_refused(regression: nn.Linear, builder: str, broken: float) -> None:
    regression.weight.data[1, 2] = broken
    name, _, labels = builder.partition(":")
    context = MaskContext(regression, batches=data((6,), (4,), 3))
    with pytest.raises(MaskError, match="not finite: training has diverged"):
        build_mask(name, context, Budget(3, 15), {"labels": labels} if labels else {})


def test_gradient_and_snip_scores(model: nn.Module) -> None:
    context = MaskContext(model, batches=data((8, 8, 3), (5,), 3))
    twin = context.scoring_model()
    params = [p for p in twin.parameters() if p.requires_grad]
    losses = torch.cat([cross_entropy(twin(x), y) for x, y in context.batches])
    gradients = torch.autograd.grad(losses.mean(), params, materialize_grads=True, allow_unused=True)
    weights = [p.detach() for p in params]
    assert_all_close(list(score_gradient(context)), [g.abs() for g in gradients])
    assert_all_close(list(score_snip(context)), [(w * g).abs() for w, g in zip(weights, gradients, strict=True)])

    k = context.table.numel // 3
    for name, scores in (("gradient", gradients), ("snip", [w * g for w, g in zip(weights, gradients, strict=True)])):
        mask = build_mask(name, context, Budget(k, context.table.numel))
        flat = torch.cat([s.abs().reshape(-1) for s in scores])
        wanted = top_k(flat, k)
        assert torch.equal(torch.cat([part.reshape(-1) for part in mask.dense()]), wanted)


def test_fisher_builder_takes_the_largest(regression: nn.Linear) -> None:
    context = MaskContext(regression, batches=data((20, 20), (4,), 3))
    for labels in ("data", "model"):
        scores = torch.cat([s.reshape(-1) for s in mean_squared_gradients(context, labels)])  # type: ignore[arg-type]
        mask = build_mask("fisher", context, Budget(5, 15), {"labels": labels})
        kept = torch.cat([part.reshape(-1) for part in mask.dense()])
        assert scores[kept].min() > scores[~kept].max()


@pytest.mark.parametrize("name", ["gradient", "snip", "fisher"])
def test_scores_need_data(regression: nn.Linear, name: str) -> None:
    with pytest.raises(MaskError, match=f"mask {name} is scored on data, and none was given"):
        build_mask(name, MaskContext(regression), Budget(3, 15))
    with pytest.raises(MaskError, match="scored on data"):
        mean_gradient(MaskContext(regression))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_scores_on_a_gpu(model: nn.Module) -> None:
    batches = data((8, 8, 3), (5,), 3)
    on_cpu = MaskContext(model, batches=batches)
    wanted = [*mean_gradient(on_cpu), *mean_squared_gradients(on_cpu, "data"), *mean_squared_gradients(on_cpu, "model")]
    mask = build_mask("fisher", on_cpu, Budget(9, on_cpu.table.numel))
    model.cuda()
    context = MaskContext(model, batches=[(x.cuda(), y.cuda()) for x, y in batches])
    found = [
        *mean_gradient(context),
        *mean_squared_gradients(context, "data"),
        *mean_squared_gradients(context, "model"),
    ]
    assert_all_close([f.cpu() for f in found], wanted)
    assert build_mask("fisher", context, Budget(9, context.table.numel)) == mask
