"""SAM around any first-order optimizer, under any mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from masks.errors import InputError, unknown_name
from masks.mask import Mask
from masks.params import ParamTable
from masks.region import Region
from sam.memory import Memory
from sam.method import Method
from sam.passes import BatchPasses, ClosurePasses, LossFn, NormStatistics, Passes, Surroundings
from sam.perturbation import NormScope, Rule, total_norm
from sam.step import Ascended, Step

OnNonFinite = Literal["skip", "raise"]

CHECKPOINT_VERSION = 2


class NonFiniteError(ArithmeticError):
    """A gradient was not finite and ``on_nonfinite="raise"``; the weights are those before the step."""


@dataclass(frozen=True, eq=False)
class StepStats:
    """What one step did; 0-dim tensors on the model's device, read without a synchronisation until you do.

    Attributes:
        loss: L(w), of the first pass (of the only pass under an empty mask).
        perturbed_loss: L(w + eps), of the second pass; equal to ``loss`` under an empty mask.
        radius: ||eps||_2 over all perturbed coordinates, also for rules whose own norm is another.
        finite: whether the step was taken; False if a gradient was not finite and the step was skipped.
    """

    loss: Tensor
    perturbed_loss: Tensor
    radius: Tensor
    finite: Tensor

    @property
    def ascent(self) -> Tensor:
        """Ascent strength ``L(w + eps) - L(w)`` on the step's batch."""
        return self.perturbed_loss - self.loss


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021) of the coordinates that a mask keeps.

    One step: gradient g at w; eps from g by ``rule`` over the mask; gradient at w + eps on the same batch;
    w restored bit for bit; ``base_optimizer`` steps with the second gradient, which is dense: the mask makes
    eps sparse, never the update. Weight decay and momentum therefore see the restored weights. Other members
    of the family put something else in one of these places: see :class:`sam.method.Method`.

    ``param_groups`` and ``state`` *are* those of the base optimizer, so schedulers, clipping and
    checkpointing tools see one truth. Each group has a key ``rho``. Per-group radii: the norm is one over the
    whole mask, and a tensor of group i moves by ``rho_i T^2 g / ||T g||``.

    Args:
        base_optimizer: an instance of any first-order optimizer over parameters of ``model``.
        model: the module whose parameters the mask describes.
        mask: which coordinates are perturbed. An empty one skips the first pass: the base optimizer.
        rho: radius of groups that do not set their own.
        rule: metric and norm; default plain L2. Short for ``method=Method(rule=rule)``.
        method: the member of the family; see :func:`sam.build_method`.
        norm_scope: "masked": ``||T^-1 eps|| = rho`` over the mask (SAM-ON, arXiv 2306.04226); "full": the
            gradient is normalised by its norm over all parameters and then masked (Sparse SAM, arXiv
            2210.05177), so that ``||T^-1 eps|| <= rho``. "full" needs every gradient, so the first pass of
            :meth:`step_on` is not restricted, and it does not exist for p = infinity.
        norm_statistics: the pass in which running statistics of normalization layers are updated: the first
            one, at w, the last one, at w + eps, or both; passes between them never do.
        replay_rng: draw the same dropout masks in both passes, by resetting the default random generators.
        seed: of everything random in the method.
        on_nonfinite: "skip" counts and skips a step with a non-finite gradient. Fused base optimizers decide
            that on the device; for others, and the first time that a parameter is stepped, one scalar is read,
            which on an accelerator waits for it. "raise" reads that scalar after every step and raises.

    Attributes:
        enabled: set it to False and the base optimizer steps alone, as outside a window of epochs.
        memory: what the method remembers.
        stats: :class:`StepStats` of the last step, None before the first.
        skipped_steps: how many steps were skipped, 0-dim int64 on the device.

    Raises:
        InputError: a setting that is unknown, out of range or does not go with another; an optimizer that
            needs more than a gradient; a mask of another model; a masked parameter that the optimizer does
            not hold.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        model: nn.Module,
        *,
        mask: Mask,
        rho: float = 0.05,
        rule: Rule | None = None,
        method: Method | None = None,
        norm_scope: NormScope = "masked",
        norm_statistics: NormStatistics = "first",
        replay_rng: bool = True,
        seed: int = 0,
        on_nonfinite: OnNonFinite = "skip",
    ) -> None:
        _check_base(base_optimizer)
        if rule is not None and method is not None:
            raise InputError("rule is a part of the method: give it there, as in Method(rule=rule)")
        self.method = method or Method(rule=rule or Rule())
        _check_choice("norm_scope", norm_scope, get_args(NormScope))
        _check_choice("norm_statistics", norm_statistics, get_args(NormStatistics))
        _check_choice("on_nonfinite", on_nonfinite, get_args(OnNonFinite))
        if norm_scope == "full" and self.method.rule.p == math.inf:
            raise InputError('norm_scope="full" has no meaning for p = infinity, whose step has no norm; use "masked"')
        _check_rho(rho)
        for group in base_optimizer.param_groups:
            _check_rho(group.get("rho", rho))
        self.norm_scope = norm_scope
        self.norm_statistics = norm_statistics
        self.replay_rng = replay_rng
        self.on_nonfinite = on_nonfinite
        self.model = model
        self._bind(mask, base_optimizer.param_groups)  # raises before the base optimizer is changed
        self.base_optimizer: Optimizer | None = None
        super().__init__(base_optimizer.param_groups, {"rho": rho})
        self.base_optimizer = base_optimizer
        self._share()
        self.enabled = True
        self.memory = Memory(seed)
        self.mask = mask
        self.stats: StepStats | None = None
        self.skipped_steps = torch.zeros((), dtype=torch.int64)
        self.set_mask(mask)
        base_optimizer.defaults["rho"] = rho
        self.defaults = base_optimizer.defaults  # schedulers look there for "momentum" and "betas"
        base_optimizer.register_load_state_dict_post_hook(self._share)

    # -- set-up ---------------------------------------------------------------------------------------------

    def _share(self, *_: Any) -> None:
        """Let ``param_groups`` and ``state`` be the base optimizer's own objects, also after it loads a state."""
        assert self.base_optimizer is not None
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        for group in self.param_groups:
            group.setdefault("rho", self.defaults["rho"])
        # The parameters that have a state: until then a fused optimizer cannot be told to skip a step.
        self._stepped = {id(p) for p, state in self.state.items() if state}

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("SAM cannot be copied or pickled; make a new one and give it this one's state_dict()")

    def set_mask(self, mask: Mask) -> None:
        """Perturb these coordinates from the next step on.

        What the method remembers of the coordinates of another mask is dropped, and counted in ``memory.resets``.

        Raises:
            InputError: see the class.
        """
        bound = self._bind(mask, self.param_groups)
        if self.memory.nbytes and mask.digest() != self.mask.digest():
            self.memory.reset()
        self.mask = mask
        self._region, self._whole, self._groups, self._devices = bound
        self.skipped_steps = self.skipped_steps.to(self._devices[0])

    def _bind(
        self, mask: Mask, groups: Sequence[dict[str, Any]]
    ) -> tuple[Region, Region | None, list[int], list[torch.device]]:
        """The mask's region, that of all parameters if it is needed, the group of every piece, the device."""
        devices = _devices(p for group in groups for p in group["params"])
        region = Region(mask, self.model)
        mask.table.check_same(ParamTable.from_model(self.model), "the mask is of another model")
        held = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        missing = [piece.row.name for piece, p in zip(region.pieces, region.params, strict=True) if id(p) not in held]
        if missing:
            raise InputError(
                f"the mask touches {len(missing)} parameters that the base optimizer does not hold, "
                f"the first is {missing[0]}"
            )
        whole = None
        if (self.norm_scope == "full" or self.method.every_gradient) and not region.is_empty:
            whole = Region(Mask(mask.table, (True,) * len(mask.table)), self.model)
        return region, whole, [held[id(p)] for p in region.params], devices

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; the mask, and so what is perturbed, stays as it is."""
        if self.base_optimizer is None:  # torch calls this while Optimizer.__init__ runs
            super().add_param_group(param_group)
            return
        param_group.setdefault("rho", self.defaults["rho"])
        _check_rho(param_group["rho"])
        self.base_optimizer.add_param_group(param_group)

    # -- the two entries ------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step in torch's convention.

        Args:
            closure: zeroes the gradients, computes the loss, calls ``backward`` and returns the loss. It is
                called twice (once under an empty mask) and must use the same batch both times. Gradients left
                from before are discarded.

        Returns:
            The loss of the first call.

        Raises:
            InputError: no closure, or a sparse gradient of a masked parameter.
            NonFiniteError: see ``on_nonfinite``.
        """
        if closure is None:
            raise InputError("SAM.step needs a closure that zeroes, runs backward and returns the loss; or use step_on")
        if self.method.batch:
            raise InputError("this method looks into the batch, which a closure hides; use step_on(loss_fn, batch)")
        with torch.enable_grad():
            return self._step(ClosurePasses(self._surroundings(), closure))

    def _surroundings(self) -> Surroundings:
        return Surroundings(self.model, self._devices, self.norm_statistics, self.replay_rng, self._clear_gradients)

    def _clear_gradients(self) -> None:
        self.zero_grad()
        for param in (self._whole or self._region).params:  # "full" may count some that no group holds
            param.grad = None

    @Optimizer.profile_hook_step
    def step_on(self, loss_fn: LossFn, batch: Any) -> Tensor:
        """One step on a batch; cheaper than :meth:`step` where the mask spares tensors.

        The first pass asks autograd only for the tensors that the mask touches; their gradients are the same,
        bit for bit.

        Args:
            loss_fn: maps ``batch`` to per-example losses, shape (B,), without calling backward.
            batch: whatever ``loss_fn`` takes.

        Returns:
            The mean loss of the first pass, 0-dim, detached.

        Raises:
            InputError: ``loss_fn`` does not return a 1-D floating-point tensor with at least one entry, or a
                masked parameter has a sparse gradient.
            NonFiniteError: see ``on_nonfinite``.
        """

        with torch.enable_grad():
            self._opt_called = True  # what learning-rate schedulers look at to see that the optimizer ran
            self._clear_gradients()
            loss: Tensor = self._step(BatchPasses(self._surroundings(), loss_fn, batch))
            return loss

    # -- the step -------------------------------------------------------------------------------------------

    def _step(self, passes: Passes) -> Any:
        perturbs = self.enabled and not self._region.is_empty
        if perturbs and not (self._whole or self._region).is_current:
            self.set_mask(self.mask)
        assert self.base_optimizer is not None
        step = Step(
            method=self.method,
            region=self._region,
            whole=self._whole,
            full_norm=self.norm_scope == "full",
            rho=[self.param_groups[i]["rho"] for i in self._groups],
            memory=self.memory,
            base=self.base_optimizer,
            zero_grad=self._clear_gradients,
        )
        due = perturbs and self.method.when.due(self.memory.steps)
        self.memory.steps += 1
        found = self._ascend(step, passes) if due else self._plain(step, passes, perturbs)
        finite = self._update(found.finite)
        if due:
            self.method.combine.after(step, finite)
        loss, perturbed = (_scalar(value, self._devices[0]) for value in (found.loss, found.perturbed_loss))
        self.stats = StepStats(loss, perturbed, found.radius, finite)
        return found.loss

    def _plain(self, step: Step, passes: Passes, perturbs: bool) -> Ascended:
        """A step without a perturbation."""
        loss = passes.backward("only")
        if perturbs:
            self.method.combine.between(step)
        zero = torch.zeros((), dtype=torch.float64, device=self._devices[0])
        return Ascended(loss, loss, zero, torch.ones((), dtype=torch.bool, device=self._devices[0]))

    def _ascend(self, step: Step, passes: Passes) -> Ascended:
        """The method's passes; the gradient to step with is in ``.grad``."""
        parts = self.method.data.parts(passes) if isinstance(passes, BatchPasses) else [passes]
        found = [self.method.ascent(step, part) for part in parts]
        if len(found) > 1:
            return _averaged(found, [part.weight for part in parts if isinstance(part, BatchPasses)])
        self.method.combine.combine(step, found[0].clean)
        return found[0]

    @torch.no_grad()
    def _update(self, finite: Tensor) -> Tensor:
        """Step the base optimizer unless a gradient is not finite; returns whether it did."""
        assert self.base_optimizer is not None
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        finite = finite & torch.isfinite(total_norm([p.grad for p in params if p.grad is not None])).to(finite.device)
        if self.on_nonfinite == "raise" and not bool(finite):
            raise NonFiniteError("a gradient is not finite (nan or infinite); the weights are those before the step")
        base: Any = self.base_optimizer
        fused = getattr(base, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in self.param_groups)
        stepped = {id(p) for p in params}
        if fused and stepped <= self._stepped:
            # The protocol of torch.amp.GradScaler: fused kernels read found_inf and do nothing where it is 1.
            base.found_inf, base.grad_scale = (~finite).float(), None
            try:
                base.step()
            finally:
                del base.found_inf, base.grad_scale
        elif bool(finite):
            base.step()
            self._stepped |= stepped
        self.skipped_steps += ~finite
        return finite

    # -- checkpoints ----------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "base_optimizer": type(self.base_optimizer).__qualname__,
            "method": repr(self.method),
            "norm_scope": self.norm_scope,
            "norm_statistics": self.norm_statistics,
            "replay_rng": self.replay_rng,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bitwise resume needs besides the model and the random generators.

        Keys: ``base`` (the base optimizer's own state, momentum included), ``mask``
        (:meth:`masks.mask.Mask.state_dict`), ``memory`` (what the method remembers), ``settings``,
        ``skipped_steps``, ``version``. Plain tensors and
        containers: ``torch.load(..., weights_only=True)`` reads it.
        """
        assert self.base_optimizer is not None
        return {
            "version": CHECKPOINT_VERSION,
            "base": self.base_optimizer.state_dict(),
            "mask": self.mask.state_dict(),
            "settings": self._settings(),
            "memory": self.memory.state_dict(),
            "skipped_steps": self.skipped_steps.clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any], *, adopt_mask: bool = False) -> None:
        """Load what :meth:`state_dict` returned.

        Args:
            state_dict: the checkpoint.
            adopt_mask: take the checkpoint's mask instead of insisting that it is this optimizer's: for masks
                that change during training.

        Raises:
            InputError: not a checkpoint of this class, or one made with another mask, other settings, or
                another model. Nothing is changed then.
        """
        assert self.base_optimizer is not None
        kinds = {"version": int, "base": dict, "mask": dict, "settings": dict, "memory": dict, "skipped_steps": Tensor}
        if not isinstance(state_dict, dict) or not all(isinstance(state_dict.get(k), t) for k, t in kinds.items()):
            raise InputError(f"not a checkpoint of SAM: it needs the keys {', '.join(sorted(kinds))}")
        if state_dict["version"] != CHECKPOINT_VERSION:
            raise InputError(f"checkpoint version {state_dict['version']}; this version reads {CHECKPOINT_VERSION}")
        # torch.load(map_location=...) may have put the mask on an accelerator.
        mask = Mask.from_state_dict({key: value.cpu() for key, value in state_dict["mask"].items()})
        self.mask.table.check_same(mask.table, "the checkpoint is of another model")
        here, there = self.mask.digest(), mask.digest()
        if here != there and not adopt_mask:
            raise InputError(
                f"the checkpoint was made with another mask: digest {there[:16]} there, {here[:16]} here; "
                "pass adopt_mask=True to take the checkpoint's"
            )
        for name, value in self._settings().items():
            if state_dict["settings"].get(name) != value:
                raise InputError(f"the checkpoint was made with {name}={state_dict['settings'].get(name)}, not {value}")
        self.memory.check(state_dict["memory"])
        if here != there:
            self._bind(mask, self.param_groups)  # raises before anything is changed
        try:
            self.base_optimizer.load_state_dict(state_dict["base"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"the base optimizer's state does not fit: {error}") from None
        if here != there:
            self.set_mask(mask)
        self.memory.load_state_dict(state_dict["memory"], self._devices[0])
        self.skipped_steps.copy_(state_dict["skipped_steps"])


def _check_base(base: Optimizer) -> None:
    if not isinstance(base, Optimizer):
        raise InputError(f"base_optimizer must be an instance of torch.optim.Optimizer, got {base!r}")
    if isinstance(base, (LBFGS, SAM)):
        raise InputError(f"{type(base).__name__} cannot be the base optimizer: its step is more than one gradient")
    if "rho" in base.defaults:
        raise InputError(
            f"this {type(base).__name__} already has a setting rho: a hyperparameter of its own (Adadelta's), or the "
            "radius of another SAM around it; make a new base optimizer"
        )
    if any(group.get("maximize") for group in base.param_groups):
        raise InputError("SAM minimizes; a base optimizer with maximize=True ascends: negate the loss instead")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(unknown_name(name, str(value), choices))


def _check_rho(rho: Any) -> None:
    # The radius may be a 0-dim tensor, so that it can change without a recompilation.
    if isinstance(rho, bool) or not isinstance(rho, (int, float, Tensor)) or not (0 <= float(rho) < math.inf):
        raise InputError(f"rho must be a finite number >= 0, got {rho}")


def _devices(params: Iterable[Tensor]) -> list[torch.device]:
    devices = sorted({p.device for p in params}, key=str)
    if len(devices) > 1:
        raise InputError(f"the parameters lie on several devices ({', '.join(map(str, devices))}); SAM needs one")
    return devices


def _scalar(loss: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(loss, device=device).detach()


def _averaged(found: Sequence[Ascended], weights: Sequence[float | None]) -> Ascended:
    """What the parts of a batch gave, weighted by their size; the radius is the mean one."""
    shares = [1.0 if weight is None else weight for weight in weights]

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum()

    return Ascended(
        mean(part.loss for part in found),
        mean(part.perturbed_loss for part in found),
        mean(part.radius for part in found),
        torch.stack([part.finite for part in found]).all(),
    )
