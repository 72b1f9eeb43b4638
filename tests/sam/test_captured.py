"""Recorded steps: the same steps, recorded when they must be; and no step reads anything from its device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from masks import Budget, MaskContext, build_mask
from masks.errors import InputError
from sam import SAM, MethodSpec, StepStats
from sam.captured import CapturedStep


class Again:
    """A recorder without a graph: a replay does the work again, with the host's values of the time of the recording."""

    def __init__(self, optimizer=None):
        self.records, self.optimizer = 0, optimizer

    def eager(self, body):
        return body()

    def record(self, body):
        self.records += 1
        groups = self.optimizer.param_groups
        then = [{name: group[name] for name in ("lr", "rho")} for group in groups], self.optimizer.enabled

        def replay():
            now = [{name: group[name] for name in ("lr", "rho")} for group in groups], self.optimizer.enabled
            self._set(*then)
            try:
                return body()
            finally:
                self._set(*now)

        return replay

    def _set(self, values, enabled):
        for group, own in zip(self.optimizer.param_groups, values, strict=True):
            group.update(own)
        self.optimizer.enabled = enabled


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def make(kind="sgd", mask="norm", method="sam", model=None, **settings):
    """A net and its optimizer."""
    model = model or net()
    base = (
        torch.optim.SGD(model.parameters(), 0.125, momentum=0.9, weight_decay=5e-4, fused=True)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), 2**-8, fused=True)
    )
    context = MaskContext(model)
    built = build_mask(mask, context, Budget.matching(build_mask("norm", context)) if mask == "random" else None)
    return model, SAM(base, model, mask=built, rho=0.5, method=MethodSpec.parse(method).build(), **settings)


def losses_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches(n, size=16):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(n)
    ]


def train(kind, mask, method, recorder):
    """Steps with everything that may change between them."""
    model, optimizer = make(kind, mask, method)
    step = None
    if recorder:
        recorder.optimizer = optimizer
        step = CapturedStep(optimizer, losses_of(model), recorder=recorder, eager_steps=2)
    seen = []
    for i, batch in enumerate(batches(16)):
        if i == 5:  # schedulers, in values that float32 has
            for group in optimizer.param_groups:
                group["lr"], group["rho"] = group["lr"] / 2, 0.25
        if i == 7:
            optimizer.set_mask(build_mask("all", MaskContext(model)))
        if i in (10, 13):
            optimizer.enabled = i == 13
        if i == 15:
            batch = (batch[0][:7], batch[1][:7])
        loss = step(batch) if step else optimizer.step_on(losses_of(model), batch)
        seen.append(torch.stack([loss.double(), *(t.double() for t in vars(optimizer.stats).values())]))
    return torch.stack(seen), model.state_dict(), optimizer.state_dict(), step


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(("mask", "method"), [("norm", "sam"), ("random", "asam"), ("all", "sam")])
def test_replayed_steps_are_the_steps(kind, mask, method):
    recorder = Again()
    wanted, got = train(kind, mask, method, None), train(kind, mask, method, recorder)
    assert torch.equal(got[0], wanted[0])
    assert all(torch.equal(got[1][name], value) for name, value in wanted[1].items())
    assert got[2]["memory"]["steps"] == wanted[2]["memory"]["steps"] == 16
    # At steps 2, 9 and, without perturbing, 12; step 13 goes on with the one of step 9.
    assert recorder.records == got[3].recordings + 1 == 3


def test_what_the_user_holds_stays_as_it_is():
    model, optimizer = make()
    step = CapturedStep(optimizer, losses_of(model), recorder=Again(optimizer), eager_steps=1)
    given = batches(3)
    for batch in given:
        step(batch)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(given, batches(3), strict=True))
    assert [type(optimizer.param_groups[0][name]) for name in ("lr", "rho")] == [float, float]
    assert optimizer.replay_rng


def replaced_weights(model, _):
    model[0].weight.data = model[0].weight.data.clone()


def replaced_statistics(model, _):
    model[1].running_mean = model[1].running_mean.clone()


def loaded_state(_, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def loaded_base_state(_, optimizer):
    optimizer.base_optimizer.load_state_dict(copy.deepcopy(optimizer.base_optimizer.state_dict()))


def other_mask_and_back(model, optimizer):
    mask = optimizer.mask
    optimizer.set_mask(build_mask("all", MaskContext(model)))
    optimizer.set_mask(mask)


def values_in_place(model, optimizer):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    for group in optimizer.param_groups:
        group["lr"] /= 2


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("change", "records"),
    [
        (values_in_place, 1),
        *((change, 2) for change in (replaced_weights, replaced_statistics, loaded_state, loaded_base_state)),
        (other_mask_and_back, 2),
    ],
)
def test_what_moves_in_memory_is_recorded_anew(kind, change, records):
    """A recording knows addresses: it would go on with weights, statistics and momenta that nothing else uses."""
    model, optimizer = make(kind)
    recorder = Again(optimizer)
    step = CapturedStep(optimizer, losses_of(model), recorder=recorder, eager_steps=2)
    made = []
    for i, batch in enumerate(batches(20)):
        if i == 10:
            change(model, optimizer)
        step(batch)
        made.append(recorder.records)
    # Recorded in the third step, although the base optimizer's state appears in the first, and in the third after.
    assert made == [0] * 2 + [1] * 10 + [records] * 8
    assert step.recordings == 1


def test_a_step_that_moves_memory_spoils_the_recordings_of_other_batches():
    model, optimizer = make()
    recorder = Again(optimizer)
    step = CapturedStep(optimizer, losses_of(model), recorder=recorder, eager_steps=1)
    large, small = batches(1)[0], batches(1, size=7)[0]
    for _ in range(2):
        step(large)
    hook = optimizer.base_optimizer.register_step_post_hook(lambda *_: replaced_weights(model, optimizer))
    step(small)
    hook.remove()
    assert recorder.records == 1
    step(large)
    assert recorder.records == 2


def test_results_are_not_overwritten():
    model, optimizer = make()

    class Same(Again):
        """As a graph does, every replay writes to the same tensors."""

        def record(self, body):
            places, again = [], super().record(body)

            def replay():
                loss, stats = again()
                found = [loss, *vars(stats).values()]
                if not places:
                    places.extend(t.clone() for t in found)
                torch._foreach_copy_(places, found)
                return places[0], StepStats(*places[1:])

            return replay

    step = CapturedStep(optimizer, losses_of(model), recorder=Same(optimizer), eager_steps=1)
    found, stats = [], []
    for batch in batches(4):
        found.append(step(batch))
        stats.append(optimizer.stats)
    assert len({float(loss) for loss in found}) == 4
    assert [float(s.loss) for s in stats] == [float(loss) for loss in found]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"base": lambda p: torch.optim.SGD(p, 0.1)}, "SGD is not fused"),
        ({"on_nonfinite": "raise"}, "on_nonfinite"),
        ({"method": "looksam:k=2"}, "not do the same in every step"),
    ],
)
def test_refused_at_once(what, words):
    model = net()
    base = what.pop("base", lambda p: torch.optim.SGD(p, 0.1, fused=True))(model.parameters())
    method = MethodSpec.parse(what.pop("method", "sam")).build()
    optimizer = SAM(base, model, mask=build_mask("norm", MaskContext(model)), method=method, **what)
    with pytest.raises(InputError, match=words):
        CapturedStep(optimizer, losses_of(model), recorder=Again(optimizer))


def test_refused_on_a_cpu_without_a_recorder():
    model, optimizer = make()
    with pytest.raises(InputError, match="parameters are on cpu"):
        CapturedStep(optimizer, losses_of(model))


@pytest.mark.parametrize(
    ("method", "dropout", "words"), [("friendly_sam", 0.0, "remembers"), ("sam", 0.5, "random numbers on the CPU")]
)
def test_refused_before_the_second_step(method, dropout, words):
    model, optimizer = make(model=net(dropout), method=method)
    step = CapturedStep(optimizer, losses_of(model), recorder=Again(optimizer), eager_steps=1)
    first, second = batches(2)
    step(first)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=words):
        step(second)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_a_graph_forbids_is_an_input_error():
    class Forbids(Again):
        def record(self, body):
            raise RuntimeError("operation not permitted when stream is capturing")

    model, optimizer = make()
    step = CapturedStep(optimizer, losses_of(model), recorder=Forbids(), eager_steps=1)
    first, second = batches(2)
    step(first)
    with pytest.raises(InputError, match="not permitted when stream is capturing; use step_on"):
        step(second)
    assert isinstance(optimizer.param_groups[0]["lr"], float)
    assert optimizer.replay_rng


READ_NOTHING = [
    *("sam", "asam", "gsam", "friendly_sam", "vasso", "wsam"),
    *("micro_batch_sam", "esam", "looksam", "fisher_sam", "exact_sam"),
]


@pytest.mark.parametrize(("mask", "norm_scope"), [("norm", "masked"), ("random", "full")])
@pytest.mark.parametrize("method", READ_NOTHING)
def test_no_step_reads_from_its_device(mask, norm_scope, method):
    """Tensors of the meta device have no values: whatever reads one raises."""
    twin, cpu = make(mask=mask)
    model = copy.deepcopy(twin).to("meta")

    class Fused(torch.optim.Optimizer):
        """Steps as fused optimizers do: told on the device whether to."""

        _step_supports_amp_scaling = True

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad * (1 - self.found_inf), alpha=-0.1)

    base = Fused(model.parameters(), {"fused": True, "lr": 0.1})
    base.state.update({p: {"step": torch.zeros(())} for p in model.parameters()})
    optimizer = SAM(base, model, mask=cpu.mask, method=MethodSpec.parse(method).build(), norm_scope=norm_scope)
    for _ in range(2):
        x, y = torch.empty(8, 3, 8, 8, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
        optimizer.step_on(losses_of(model), (x, y))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        bool(optimizer.stats.finite)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("mask", ["norm", "all", "random"])
def test_a_graph_follows_the_eager_trajectory(kind, mask):
    found = []
    for captured in (False, True):
        model, optimizer = make(kind, mask, model=net().cuda())
        step = CapturedStep(optimizer, losses_of(model)) if captured else None
        losses = []
        for i, (x, y) in enumerate(batches(20)):
            batch = (x.cuda(), y.cuda())
            for group in optimizer.param_groups:
                group["lr"] = (0.125 if kind == "sgd" else 2**-8) * (1 - i / 40)
            losses.append(step(batch) if step else optimizer.step_on(losses_of(model), batch))
        found.append(torch.stack(losses))
        assert int(optimizer.skipped_steps) == 0
    assert step.recordings == 1
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
