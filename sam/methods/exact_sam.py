"""Exact SAM: several ascent steps, and the exact gradient of the loss at the point that they reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from masks.errors import InputError
from sam.method import Ascent, Direction, Method, Setting
from sam.passes import BatchPasses, Passes, check_second_derivative, twice_differentiable
from sam.perturbation import BiasConvention, RegionVector, Rule, perturb_along, total_norm
from sam.registry import register_method
from sam.step import Ascended, Step


@dataclass(frozen=True, eq=False)
class Visited:
    """A point of the ascent.

    Attributes:
        eps: where it lies, in the form of :meth:`masks.region.Region.gather`; empty for w itself.
        gradients: the gradient there, one tensor per parameter of ``step.first_region``.
    """

    eps: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True)
class ManySteps(Ascent):
    """``eps_{j+1} = Proj(eps_j + stride rho T^2 g_j / ||T g_j||)``, g_j the gradient at w + eps_j, T that at w.

    The ball is ``{||T^-1 eps||_p <= rho}`` over the mask, with each group's own rho. For p = infinity a step is
    ``stride rho T sign(g_j)``. After the last step ``.grad`` holds the gradient at w + eps_n.

    Args:
        steps: n, the number of ascent steps.
        stride: length of one step in units of rho.
        project: whether the iterates are put back into the ball. While j stride <= 1 they cannot have left it.
    """

    steps: int
    stride: float
    project: bool

    def __call__(self, step: Step, passes: Passes) -> Ascended:
        return self._ascend(step, passes, None)

    def _ascend(self, step: Step, passes: Passes, visited: list[Visited] | None) -> Ascended:
        """Run the passes; the points before the last one are put into ``visited``, if there is such a list."""
        if type(step.method.direction) is not Direction:
            raise InputError(f"{type(self).__name__} climbs along the gradient, not along {step.method.direction!r}")
        loss, gradients = passes.gradients(step.first_region)
        clean = gradients if step.keeps_clean else []
        point = Visited([], gradients)
        eps, finite = self._advance(step, 0, point)
        for j in range(1, self.steps):
            if visited is not None:
                visited.append(point)
            del point, gradients  # held through a pass they would cost memory
            with step.moved(list(eps)):
                _, gradients = passes.gradients(step.first_region, "inner")
            point = Visited(eps, gradients)
            eps, here = self._advance(step, j, point)
            finite = finite & here
        if visited is not None:
            visited.append(point)
        del point, gradients
        radius = total_norm(eps).to(finite.device)
        with step.moved(eps):
            perturbed = step.descend(passes)
        return Ascended(loss, perturbed, radius, finite, clean)

    def _advance(
        self, step: Step, j: int, point: Visited, weights: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """eps_{j+1} from eps_j and g_j, and whether g_j was finite; the weights must be w.

        Args:
            step: the step.
            j: its number.
            point: eps_j and g_j.
            weights: w as differentiable tensors, one per parameter of ``step.first_region``, if the derivative will
                be asked for.
        """
        inside = [i if step.whole is None else piece.position for i, piece in enumerate(step.region.pieces)]
        along = RegionVector(step.region, step.masked(point.gradients), None, weights and [weights[i] for i in inside])
        norm_over = None
        if step.full_norm and step.whole is not None:
            norm_over = RegionVector(step.whole, step.whole.gather(point.gradients), None, weights)
        rho = step.rho if self.stride == 1 else [radius * self.stride for radius in step.rho]
        rule = step.method.rule
        found = perturb_along(rule, along, rho, norm_over=norm_over, differentiable=weights is not None)
        eps = [e + move for e, move in zip(point.eps, found.values, strict=True)] if point.eps else found.values
        if self.project and (j + 1) * self.stride > 1 + 1e-9:
            eps = _project(rule, along, step.rho, eps)
        return eps, found.finite


def _project(rule: Rule, at: RegionVector, rho: Sequence[float | Tensor], eps: Sequence[Tensor]) -> list[Tensor]:
    """The nearest point (in the metric T^-1) of the ball ``{||T^-1 eps||_p <= rho}``, rho being one per piece."""
    bounds = []
    for piece, radius, scale, e in zip(at.region.pieces, rho, at.scales(rule.metric), eps, strict=True):
        T = torch.ones((), dtype=e.dtype, device=e.device) if scale is None else scale
        bounds.append(T * (radius * rule.metric.radius_factor(piece.row)))
    if rule.p == math.inf:
        return [torch.minimum(torch.maximum(e, -bound), bound) for e, bound in zip(eps, bounds, strict=True)]
    # Where the bound is 0 so is eps: such a coordinate never moves.
    unit = [e / torch.where(bound > 0, bound, 1) for e, bound in zip(eps, bounds, strict=True)]
    shrink = total_norm(unit).clamp(min=1).reciprocal()
    return [e * shrink.to(e.dtype) for e in eps]


@dataclass(frozen=True)
class ExactGradient(ManySteps):
    """The gradient of ``w -> L(w + eps_n(w))``: :class:`ManySteps` with the derivative of eps_n.

    With v_n the masked gradient at w + eps_n, and A_j the map ``(eps_j, g_j, w) -> eps_{j+1}`` of one step, for
    j = n - 1 ... 0: ``(u, s, t) = A_j'^T v_{j+1}``, ``h = H(w + eps_j) s``; h + t is added to the gradient, and
    ``v_j = u + m h``. All points are visited again, each with a forward pass, a gradient with its graph and one
    product with the Hessian there; eps_j and g_j of every step are held until then.
    """

    batch = True

    def check(self, setting: Setting) -> None:
        check_second_derivative(setting.scaled, setting.replicated)

    def __call__(self, step: Step, passes: Passes) -> Ascended:
        if not isinstance(passes, BatchPasses):
            raise InputError("backpropagation through eps needs loss and batch in one piece: step_on(loss_fn, batch)")
        visited: list[Visited] = []
        # The fused attention kernels have no second derivative, and they draw other dropout masks than the plain one.
        with sdpa_kernel(SDPBackend.MATH):
            found = self._ascend(step, passes, visited)
            self._add_derivative_of_eps(step, passes, visited)
        return found

    def _add_derivative_of_eps(self, step: Step, passes: BatchPasses, visited: list[Visited]) -> None:
        updated = [p for group in step.base.param_groups for p in group["params"] if p.grad is not None]
        inputs = list({id(p): p for p in [*step.first_region.params, *updated]}.values())
        total = {id(p): torch.zeros_like(p) for p in inputs}
        v = step.region.gather([torch.zeros_like(p) if p.grad is None else p.grad for p in step.region.params])
        while visited:
            point = visited.pop()
            u, s, t = self._pull_back(step, len(visited), point, v)
            _add(total, step.first_region.params, t)
            here = step.moved(point.eps) if point.eps else nullcontext()
            with here, passes.graph(step.first_region) as graph, twice_differentiable():
                h = _vjp(graph, inputs, s)
            _add(total, inputs, h)
            through = {id(p): g for p, g in zip(inputs, h, strict=True)}
            v = step.region.gather([through[id(p)] for p in step.region.params])
            v = [a + b for a, b in zip(v, u, strict=True)] if u else v
        for param in updated:
            param.grad.add_(total[id(param)])

    def _pull_back(
        self, step: Step, j: int, point: Visited, v: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The products of v with the derivatives of eps_{j+1} by eps_j, by g_j, and, through T, by w."""
        eps, gradients, weights = (
            [tensor.detach().requires_grad_() for tensor in tensors]
            for tensors in (point.eps, point.gradients, [piece.param for piece in step.first_region.pieces])
        )
        out, _ = self._advance(step, j, Visited(eps, gradients), weights)
        found = _vjp(out, [*eps, *gradients, *weights], v)
        split = len(eps) + len(gradients)
        return found[: len(eps)], found[len(eps) : split], found[split:]


def _vjp(outputs: Sequence[Tensor], inputs: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """``sum_k J_k^T v_k`` for outputs with Jacobians J_k."""
    pairs = [(out, w) for out, w in zip(outputs, v, strict=True) if out.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    moving, factors = zip(*pairs, strict=True)
    return list(torch.autograd.grad(moving, inputs, factors, allow_unused=True, materialize_grads=True))


def _add(total: dict[int, Tensor], params: Sequence[Tensor], terms: Sequence[Tensor]) -> None:
    torch._foreach_add_([total[id(p)] for p in params], list(terms))


@register_method(
    "exact_sam",
    summary="n ascent steps, with or without projection, and the exact gradient of L(w + eps(w))",
    source="Tiwary and Aananth 2024, arXiv 2411.01714 (known here from its abstract), of Foret et al. 2021's objective",
    passes=(
        "4 steps + 1, counting matrix products (in time more: 6.05 measured in ResNet-20 with one step); "
        "steps + 1 with backpropagate=false"
    ),
    num_passes=lambda steps, backpropagate, **options: 4.0 * steps + 1 if backpropagate else steps + 1.0,
    tuned_on="nothing; the radius is SAM's",
    limits=(
        "backpropagate needs step_on, which hands over the loss function; a closure has called backward already",
        "backpropagate is refused for p = infinity: the sign of the gradient has derivative zero almost everywhere",
        "backpropagate needs operations with second derivatives: compiled models and cuDNN's recurrent layers are "
        "refused; custom autograd functions whose backward is not differentiable count as linear, unnoticed by torch",
        "backpropagate needs one process, no GradScaler, and the batch in one piece",
    ),
)
def exact_sam(
    *,
    steps: int = 1,
    backpropagate: bool = True,
    project: bool = True,
    step: float | None = None,
    rule: Literal["l2", "linf", "elementwise_l2", "elementwise_linf", "layerwise_l2", "layerwise_linf"] = "l2",
    eta: float | None = None,
    bias: BiasConvention = "identity",
) -> Method:
    """The SAM objective without its first-order approximations (Tiwary and Aananth 2024).

    ``eps_{j+1} = Proj(eps_j + step rho T^2 g(w + eps_j) / ||T g(w + eps_j)||)`` from eps_0 = 0, n times; then the
    gradient at w + eps_n and, with ``backpropagate``, ``(d eps_n / d w)^T`` times it: together the gradient of
    ``w -> L(w + eps_n(w))``, also through T. One step with T = 1 adds ``(rho / ||g||) H (I - g g^T / ||g||^2) v`` with
    the masked v and g. One step without ``backpropagate`` is SAM (or ASAM).

    Normalization layers in training mode normalise by the batch in every pass, and the derivative goes through that;
    running statistics do not enter. Piecewise linear activations have the second derivative zero where it exists.
    Each of the n Hessian products from scratch has three passes' worth of matrix products; the second derivatives of
    convolutions and BatchNorm take more (measured on a CPU, one step in all: 5.2 passes in an MLP, 6.05 in
    ResNet-20, 6.9 in ResNet-18).
    Unverified: step lengths and defaults of the paper, of which no code is known.

    Args:
        steps: n.
        backpropagate: whether the derivative of eps is taken into account.
        project: whether the iterates are kept in the ball of radius rho. Needed only if n step > 1.
        step: length of one ascent step in units of rho; 1 / n unless set.
        rule: metric T and norm, as in ASAM.
        eta: floor of an adaptive metric.
        bias: whether an adaptive metric treats biases like weights.

    Raises:
        InputError: a value that is out of range or does not go with another.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if step is not None and not 0 < step < math.inf:
        raise InputError(f"step must be a finite number > 0, in units of rho, got {step}")
    found = Rule.named(rule, eta=eta, bias=bias)
    if backpropagate and found.p == math.inf:
        raise InputError(
            f"rule={rule} takes the sign of the gradient, whose derivative is zero almost everywhere; "
            "set backpropagate=false, or take an l2 rule"
        )
    kind = ExactGradient if backpropagate else ManySteps
    return Method(rule=found, ascent=kind(steps, 1 / steps if step is None else step, project))
