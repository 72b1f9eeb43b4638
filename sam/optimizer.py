"""SAM around any first-order optimizer, under any mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer

from masks.errors import InputError
from masks.mask import Mask
from masks.norm_stats import SavedStatistics, statistics
from masks.params import ParamTable
from masks.region import Region
from sam.accumulation import Accumulated, AccumulatedPasses
from sam.checks import check_choice, check_rho, one_device
from sam.memory import Memory, Shapes
from sam.method import Method, Setting
from sam.parallel import AscentGradient, Replicas, check_not_sharded, find_wrapper
from sam.passes import BatchPasses, ClosurePasses, LossFn, NormStatistics, Passes, Surroundings
from sam.perturbation import NormScope, Rule
from sam.precision import LossScaling, check_scaler
from sam.prefix import Prefix, ReusePrefix
from sam.step import Ascended, Step, StepStats
from sam.update import NonFiniteError, OnNonFinite, Update
from sam.wrappers import unwrapped, unwrapped_mask

__all__ = ["SAM", "NonFiniteError", "StepStats"]

CHECKPOINT_VERSION = 3


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
        model: the module whose parameters the mask describes; it may be wrapped in DistributedDataParallel or
            compiled, and the mask built on it with or without the wrapper.
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
        on_nonfinite: "skip" counts and skips a step with a non-finite gradient; the running statistics and what the
            method remembers are then those before the step, too. Fused base optimizers decide
            that on the device; for others, and the first time that a parameter is stepped, one scalar is read,
            which on an accelerator waits for it. "raise" reads that scalar after every step and raises.
        clip_grad_norm: largest norm of the gradient that the base optimizer steps with, over all its parameters (as
            ``torch.nn.utils.clip_grad_norm_``; the ascent's is never clipped: its length does not count). Anything
            else that is to see the final gradient at the restored weights: ``base_optimizer.register_step_pre_hook``.
        scaler: for float16 under autocast. A step with an infinity in any pass is skipped and counted; the scale is
            updated once per step, here: do not call the scaler's ``step`` and ``update``, and save its state yourself
            (``scaler.state_dict()``). All that methods see is unscaled. bfloat16 needs no scaler.
        ascent_gradient: under DistributedDataParallel, "replica": each replica ascends along the gradient of its own
            shard, which costs no communication and is ``micro_batch_sam`` with one part per replica; "synchronised":
            all along the average, as in one process on the whole batch. Averages give every replica the same
            weight, as DDP does, so shards should be of one size. Masks must be the same on all replicas. Methods
            that remember gradients (``friendly_sam``, ``vasso``) remember each replica's own under "replica": every
            rank must then save and load its own :meth:`state_dict`, and that of another rank is refused.
        reuse_prefix: whether :meth:`step_on` computes once instead of twice what no perturbed weight reaches. It
            changes no bit, and holds the results of those operations from the first pass to the last; most of them
            autograd keeps alive anyway. "auto" does so on CPUs where the mask leaves enough in front of it, "on"
            wherever anything can be reused, "off" never. See :mod:`sam.tape`.

    Attributes:
        enabled: set it to False and the base optimizer steps alone, as outside a window of epochs.
        memory: what the method remembers.
        prefix: how much of the final pass is reused, or why not: see :class:`sam.prefix.Prefix`.
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
        clip_grad_norm: float | None = None,
        scaler: GradScaler | None = None,
        ascent_gradient: AscentGradient = "replica",
        reuse_prefix: ReusePrefix = "auto",
    ) -> None:
        _check_base(base_optimizer)
        if rule is not None and method is not None:
            raise InputError("rule is a part of the method: give it there, as in Method(rule=rule)")
        self.method = method or Method(rule=rule or Rule())
        check_choice("norm_scope", norm_scope, get_args(NormScope))
        check_choice("norm_statistics", norm_statistics, get_args(NormStatistics))
        check_choice("on_nonfinite", on_nonfinite, get_args(OnNonFinite))
        check_choice("ascent_gradient", ascent_gradient, get_args(AscentGradient))
        check_choice("reuse_prefix", reuse_prefix, get_args(ReusePrefix))
        if scaler is not None:
            check_scaler(scaler, on_nonfinite, (p for group in base_optimizer.param_groups for p in group["params"]))
        if norm_scope == "full" and self.method.rule.p == math.inf:
            raise InputError('norm_scope="full" has no meaning for p = infinity, whose step has no norm; use "masked"')
        check_rho(rho)
        for group in base_optimizer.param_groups:
            check_rho(group.get("rho", rho))
        self.norm_scope = norm_scope
        self.norm_statistics = norm_statistics
        self.replay_rng = replay_rng
        self.on_nonfinite = on_nonfinite
        self.clip_grad_norm = clip_grad_norm
        self.scaler = scaler
        self.ascent_gradient = ascent_gradient
        self.reuse_prefix = reuse_prefix
        self.model = unwrapped(model)
        check_not_sharded(self.model)
        mask = unwrapped_mask(mask, self.model)
        self.memory = Memory(seed)
        self._replicas: Replicas | None = None
        self._check_method(mask.table, base_optimizer, replicated=False)
        self._find_replicas(model, mask.table, base_optimizer)
        self._bind(mask, base_optimizer.param_groups)  # raises before the base optimizer is changed
        self._update = Update(base_optimizer, on_nonfinite, clip_grad_norm)
        self.base_optimizer: Optimizer | None = None
        super().__init__(base_optimizer.param_groups, {"rho": rho})
        self.base_optimizer = base_optimizer
        self._share()
        self.enabled = True
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
        self._update.base_state_changed()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("SAM cannot be copied or pickled; make a new one and give it this one's state_dict()")

    def set_mask(self, mask: Mask) -> None:
        """Perturb these coordinates from the next step on.

        What the method remembers of the masked coordinates alone is dropped if these change, and that is counted in
        ``memory.resets``; what it remembers of all parameters is kept.

        Raises:
            InputError: see the class.
        """
        mask = unwrapped_mask(mask, self.model)
        bound = self._bind(mask, self.param_groups)
        if self.memory.nbytes:
            same = self.norm_scope == "full" or mask.digest() == self.mask.digest()
            self.memory.fit(self._shapes(bound[0]), same_mask=same)
        self.mask = mask
        self._region, self._whole, self._groups, self._devices = bound
        self.prefix = Prefix(self.reuse_prefix, self.model, self._region)
        self.skipped_steps = self.skipped_steps.to(self._devices[0])
        scaler = self.scaler
        self._scaling = LossScaling(scaler, self._devices[0]) if scaler is not None and scaler.is_enabled() else None

    def _check_method(self, table: ParamTable, base: Optimizer, *, replicated: bool) -> None:
        setting = Setting(
            base=base,
            norm_scope=self.norm_scope,
            clip_grad_norm=self.clip_grad_norm,
            scaled=self.scaler is not None and self.scaler.is_enabled(),
            replicated=replicated,
        )
        self.method.check(table, setting)

    def _shapes(self, region: Region) -> Shapes:
        """Of what the method may remember under a mask with this region, one per tensor."""
        every = [row.shape for row in region.mask.table if row.numel]
        return {"counted": every if self.norm_scope == "full" else [p.shape for p in region.pieces], "all": every}

    def _find_late_wrapper(self) -> None:
        """A wrapper may have been made since construction, until the first step."""
        if self.stats is None and self._replicas is None and self.base_optimizer is not None:
            self._find_replicas(self.model, self.mask.table, self.base_optimizer)
            if self._replicas is not None:
                self.set_mask(self.mask)

    def _find_replicas(self, model: nn.Module, table: ParamTable, base: Optimizer) -> None:
        wrapper = find_wrapper(model)
        if wrapper is None:
            return
        if self.ascent_gradient == "replica" and self.method.every_gradient:
            raise InputError(
                "this method steps with a mixture of gradients, and replicas that mix in their own would drift apart; "
                'use ascent_gradient="synchronised"'
            )
        self._check_method(table, base, replicated=True)
        self._replicas = Replicas(wrapper, self.ascent_gradient)
        if self.ascent_gradient == "replica":
            self.memory.replica = self._replicas.place

    def _bind(
        self, mask: Mask, groups: Sequence[dict[str, Any]]
    ) -> tuple[Region, Region | None, list[int], list[torch.device]]:
        """The mask's region, that of all parameters if it is needed, the group of every piece, the device."""
        if self._replicas is not None:
            self._replicas.check_same(mask)
        self.method.check_mask(mask)
        devices = one_device(p for group in groups for p in group["params"])
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
        check_rho(param_group["rho"])
        self.base_optimizer.add_param_group(param_group)

    # -- the two entries ------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step in torch's convention.

        To accumulate gradients, let the closure run over the micro-batches, zeroing the gradients once, and call
        ``backward`` on each one's mean loss times its share of the examples. Under a scaler it calls
        ``scaler.scale(loss).backward()``, and returns the loss itself.

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
        self._find_late_wrapper()
        if self._perturbs and not (self._whole or self._region).is_current:
            self.set_mask(self.mask)
        return Surroundings(
            devices=self._devices,
            norm_statistics=self.norm_statistics,
            replay_rng=self.replay_rng,
            zero_grad=self._clear_gradients,
            params=self._params,
            statistics=statistics(self.model),
            scaling=self._scaling,
            replicas=self._replicas,
        )

    def _params(self) -> list[Tensor]:
        held = [p for group in self.param_groups for p in group["params"]]
        return list({id(p): p for p in [*held, *(self._whole or self._region).params]}.values())

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
            batch: whatever ``loss_fn`` takes; or :class:`Accumulated` micro-batches, each of which it takes.

        Returns:
            The mean loss of the first pass, 0-dim, detached.

        Raises:
            InputError: ``loss_fn`` does not return a 1-D floating-point tensor with at least one entry, or a
                masked parameter has a sparse gradient.
            NonFiniteError: see ``on_nonfinite``.
        """

        with torch.enable_grad():
            if self.method.batch and isinstance(batch, Accumulated):
                raise InputError("this method looks into the batch, which Accumulated hides; give it in one piece")
            self._opt_called = True  # what learning-rate schedulers look at to see that the optimizer ran
            self._clear_gradients()
            around = self._surroundings()
            if isinstance(batch, Accumulated):
                loss: Tensor = self._step(AccumulatedPasses(around, loss_fn, batch))
            else:
                tape = self.prefix.tape(around, loss_fn, batch)
                loss = self._step(BatchPasses(around, loss_fn, batch, tape=tape))
                self.prefix.finish()
            return loss

    # -- the step -------------------------------------------------------------------------------------------

    def _step(self, passes: Passes) -> Any:
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
        due = self._perturbs and self.method.when.due(self.memory.steps)
        self.memory.steps += 1
        self.memory.discard()
        running = SavedStatistics(passes.surroundings.statistics)
        found = self._ascend(step, passes) if due else self._plain(step, passes)
        finite = found.finite if self._replicas is None else self._replicas.agree(found.finite)
        try:
            finite = self._update(finite, self._scaling)
        except NonFiniteError:
            running.restore_unless(torch.zeros_like(finite))
            raise
        running.restore_unless(finite)
        self.memory.commit(finite)
        self.skipped_steps += ~finite
        if due:
            self.method.combine.after(step, finite)
        self.stats = StepStats.of(found, finite)
        return found.perturbed_loss if found.loss is None else found.loss

    @property
    def _perturbs(self) -> bool:
        return self.enabled and not self._region.is_empty

    def _plain(self, step: Step, passes: Passes) -> Ascended:
        """A step without a perturbation."""
        loss = passes.backward("only")
        if self._perturbs:
            self.method.combine.between(step)
        return Ascended.unperturbed(loss, self._devices[0])

    def _ascend(self, step: Step, passes: Passes) -> Ascended:
        """The method's passes; the gradient to step with is in ``.grad``."""
        parts = self.method.data.parts(passes) if isinstance(passes, BatchPasses) else [passes]
        found = [self.method.ascent(step, part) for part in parts]
        if len(found) > 1:
            return Ascended.averaged(found, [part.weight for part in parts if isinstance(part, BatchPasses)])
        self.method.combine.combine(step, found[0].clean)
        return found[0]

    # -- checkpoints ----------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "base_optimizer": type(self.base_optimizer).__qualname__,
            "method": repr(self.method),
            "norm_scope": self.norm_scope,
            "norm_statistics": self.norm_statistics,
            "replay_rng": self.replay_rng,
            "clip_grad_norm": self.clip_grad_norm,
            "ascent_gradient": self.ascent_gradient,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bitwise resume needs besides the model and the random generators.

        Keys: ``base`` (the base optimizer's own state, momentum included), ``mask``
        (:meth:`masks.mask.Mask.state_dict`), ``memory`` (what the method remembers), ``settings``,
        ``skipped_steps``, ``version``. Plain tensors and containers: ``torch.load(..., weights_only=True)`` reads it.
        It does not depend on the memory layout of the parameters. One rank's state serves all, except for methods that
        remember gradients under ``ascent_gradient="replica"``: there every rank saves its own.
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
                another model, or by another replica. Nothing is changed then.
        """
        assert self.base_optimizer is not None
        self._find_late_wrapper()
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
        region, *_ = self._bind(mask, self.param_groups)  # raises before anything is changed
        self.memory.check(state_dict["memory"], self._shapes(region))
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
