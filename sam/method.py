"""A member of the SAM family: what stands in each slot of a step.

A step: gradient g at w; a direction d from g and what is remembered; eps from d by the rule (metric, norm) and the
radius, over the mask; the gradient at w + eps; w restored; the two gradients combined; the base optimizer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.optim import Optimizer

from masks.errors import InputError
from masks.mask import Mask
from masks.params import ParamTable
from masks.spec import MaskSpec
from sam.memory import Memory
from sam.mup import MupRole
from sam.passes import BatchPasses, Passes
from sam.perturbation import NormScope, Perturbation, Rule
from sam.step import Ascended, Step

OWN_MEMORY = (
    "data-parallel training with ascent_gradient=replica: every rank has a running mean of its own, and must save and "
    "load a state_dict of its own; that of another rank is refused"
)
"""A limit of directions with a memory."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method is used with.

    Attributes:
        base: the base optimizer.
        norm_scope, clip_grad_norm: as in :class:`sam.SAM`.
        scaled: whether there is a GradScaler.
        replicated: whether there are replicas.
    """

    base: Optimizer
    norm_scope: NormScope
    clip_grad_norm: float | None
    scaled: bool
    replicated: bool


@dataclass(frozen=True)
class Direction:
    """The gradient itself; base class of what is ascended along.

    Attributes:
        radius_factor: what rho is multiplied by.
    """

    @property
    def radius_factor(self) -> float:
        return 1.0

    def __call__(self, gradient: Sequence[Tensor], memory: Memory) -> list[Tensor]:
        """The direction.

        Args:
            gradient: over the coordinates that the norm counts, in the form of
                :meth:`masks.region.Region.gather`; not changed.
            memory: what is remembered, over the same coordinates.
        """
        return list(gradient)


@dataclass(frozen=True)
class Ascent:
    """One step to w + eps; base class of how the perturbed point, and the gradient there, is found.

    Attributes:
        every_gradient: whether the first pass needs the gradient of every parameter.
        batch: whether it needs :meth:`sam.SAM.step_on`.
    """

    every_gradient = False
    batch = False

    def check(self, setting: Setting) -> None:
        """Refuse base optimizers and settings with which it cannot work.

        Raises:
            InputError: this is one.
        """

    def __call__(self, step: Step, passes: Passes) -> Ascended:
        """Run the passes; afterwards ``.grad`` holds the gradient to step with, and the weights are w."""
        loss, gradients = passes.gradients(step.first_region)
        found = self.perturbation(step, gradients)
        clean = gradients if step.keeps_clean else []
        del gradients  # held through the second pass they would cost memory and time
        with step.moved(found.directions, found.multiplier):
            perturbed = step.descend(passes)
        return Ascended(loss, perturbed, found.radius, found.finite, clean)

    def perturbation(self, step: Step, gradients: Sequence[Tensor]) -> Perturbation:
        """eps from the gradients of ``step.first_region``."""
        return step.perturbation(gradients)


@dataclass(frozen=True)
class Combine:
    """The gradient at w + eps is stepped with; base class of how it is mixed with others.

    Attributes:
        every_gradient: whether the gradient at w of every parameter is needed.
    """

    every_gradient = False

    def check(self, setting: Setting) -> None:
        """As :meth:`Ascent.check`."""

    def combine(self, step: Step, clean: Sequence[Tensor]) -> None:
        """Change ``.grad``, which holds the gradient at w + eps, in place.

        Args:
            step: the step.
            clean: the gradient at w, one tensor per parameter of ``step.first_region``; empty unless
                ``every_gradient``.
        """

    def between(self, step: Step) -> None:
        """Change ``.grad``, the gradient at w, in a step in which the method does not apply."""

    def after(self, step: Step, finite: Tensor) -> None:
        """Change the weights after the base optimizer has stepped; ``finite`` (0-dim bool) says whether it did."""


@dataclass(frozen=True)
class Data:
    """One batch in both passes; base class of which examples the passes see.

    Attributes:
        batch: whether it needs :meth:`sam.SAM.step_on`.
    """

    batch = False

    def parts(self, passes: BatchPasses) -> list[BatchPasses]:
        """Parts of the batch, each with a perturbation of its own."""
        return [passes]

    def descending(self, passes: BatchPasses, memory: Memory) -> BatchPasses:
        """The examples of the final pass; called at w + eps."""
        return passes


@dataclass(frozen=True)
class When:
    """Every step; base class of when the method applies."""

    def due(self, step: int) -> bool:
        """Whether the step with this number, from 0, perturbs."""
        return True


@dataclass(frozen=True)
class Method:
    """A composition of slots; the default is SAM (Foret et al. 2021).

    Attributes:
        rule: metric T and norm p.
        direction: what is ascended along.
        ascent: how w + eps is reached, and the gradient taken there.
        combine: how gradients make the one that the base optimizer sees.
        data: which examples each pass sees.
        when: in which steps the method applies; in the others the base optimizer steps.
        required: settings without which it is another method: "norm_scope", and "mask", as
            :meth:`masks.MaskSpec.parse` reads it; see ``preset`` in :class:`sam.MethodInfo`.

    Raises:
        InputError: slots that do not go together.
    """

    rule: Rule = field(default_factory=Rule)
    direction: Direction = field(default_factory=Direction)
    ascent: Ascent = field(default_factory=Ascent)
    combine: Combine = field(default_factory=Combine)
    data: Data = field(default_factory=Data)
    when: When = field(default_factory=When)
    required: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        divides = type(self.data).parts is not Data.parts
        plain = type(self.direction) is Direction and type(self.combine) is Combine and type(self.ascent) is Ascent
        if divides and not plain:
            raise InputError(f"{self.data!r} perturbs every part of a batch by itself; it goes with plain slots only")

    def check(self, table: ParamTable, setting: Setting) -> None:
        """Refuse parameters, base optimizers and settings with which a slot cannot work.

        Raises:
            InputError: what does not fit, or a method that must be made for a model first (:meth:`prepared`).
        """
        scope = self.required.get("norm_scope", setting.norm_scope)
        if scope != setting.norm_scope:
            raise InputError(f'this method has norm_scope="{scope}", got "{setting.norm_scope}"; give SAM the first')
        self.rule.metric.check(table)
        self.ascent.check(setting)
        self.combine.check(setting)

    def check_mask(self, mask: Mask) -> None:
        """Refuse a mask that is not the method's own; an empty one, with which training may begin, never.

        Raises:
            InputError: it was built by another builder, with other options, or by hand.
        """
        if "mask" not in self.required or not mask.num_kept:
            return
        own, found = MaskSpec.parse(self.required["mask"]), mask.provenance
        if (found.builder, dict(found.options)) != (own.name, dict(own.options)):
            options = f" with {dict(found.options)}" if found.builder == own.name else ""
            raise InputError(
                f"this method has a mask of its own, {own}, and this one is {found.builder}{options}; build it by "
                f'MaskSpec.parse("{own}").build(context, budget), and again when the method says'
            )

    def prepared(
        self, model: nn.Module, base_model: nn.Module, *, roles: Mapping[str, MupRole] | None = None
    ) -> Method:
        """The method made for a model, where it needs one (``needs_model`` in the registry); else itself.

        Args:
            model: the model to train.
            base_model: the same model at the width at which radius and learning rate were tuned.
            roles: see :func:`sam.mup.mup_roles`.

        Raises:
            InputError: a metric cannot be made for these models.
        """
        return replace(self, rule=replace(self.rule, metric=self.rule.metric.prepared(model, base_model, roles)))

    @property
    def every_gradient(self) -> bool:
        """Whether the first pass needs the gradient of every parameter, and so is not restricted to the mask."""
        return self.ascent.every_gradient or self.combine.every_gradient

    @property
    def batch(self) -> bool:
        """Whether it needs :meth:`sam.SAM.step_on`, which hands it the batch."""
        return self.ascent.batch or self.data.batch
