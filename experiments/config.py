"""Configurations: what a run is, and what a comparison of arms is. Plain frozen data, no behaviour of training."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import joblib

from masks.errors import InputError, unknown_name
from masks.spec import MaskSpec
from sam.perturbation import RULE_NAMES, Rule

BASELINE = "none"
"""Name of the arm that every other arm is compared with: the base optimizer."""


_CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "rule": RULE_NAMES,
    "bias": ("identity", "adaptive"),
    "norm_scope": ("masked", "full"),
    "norm_statistics": ("first", "second", "both"),
}
"""Settings with a fixed list of values; an unknown one must not fall through to some default."""


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Args:
        data: digits, a torchvision image set by name (cifar10, fashion_mnist, ...), folder:DIR or npz:FILE.
        n_train: number of training images (default: 400 for digits, else what n_val leaves of the images that
            rho may be chosen on: the training split, or 40 % of a data set without a test split of its own).
        n_val: number of validation images (default: 300 for digits, else a fifth of those images).
        n_test: number of test images (default: the whole test split, or a third of a data set without one).
        label_noise: share of training labels redrawn at random (default: 0.2 for digits, else 0).
        model: resnet_small, vit_small, mlp, torchvision:NAME or module:function of your own.
        width: width of a built-in model (default: its own).
        optimizer: base optimizer.
        lr: peak learning rate; it falls to 0 by a cosine over all steps.
        momentum: momentum of sgd.
        weight_decay: weight decay of the base optimizer, on all parameters.
        epochs: passes over the training images.
        batch_size: images per step; an incomplete last batch of an epoch is used as it is.
        mask: which coordinates are perturbed, as name[:option=value...][@schedule]; see `sam-masks masks`.
        match: a budgeted mask keeps as many coordinates as this mask of natural size.
        density: a budgeted mask keeps this fraction instead of matching.
        rho: radius of the perturbation.
        rule: metric and norm of the perturbation.
        eta: floor of an adaptive rule (default: the rule's own).
        bias: whether an adaptive rule scales biases ("adaptive") or not ("identity").
        norm_scope: normalise the gradient over the mask, or over all parameters before masking.
        norm_statistics: pass in which running statistics of normalization layers are updated.
        score_images: training images that a score mask is scored on; drawn with the seed, the same in every arm.
        seed: seed of the run; every purpose has a stream of its own, so runs of a seed are paired.
        tuning: train and validate on the development images only and leave the test images alone.
        measure_every: measure fit and flatness along training, too, after so many epochs each time; 0 for at the end
            only. Training is bitwise the same.
    """

    data: str = "digits"
    n_train: int | None = None
    n_val: int | None = None
    n_test: int | None = None
    label_noise: float | None = None
    model: str = "resnet_small"
    width: int | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 20
    batch_size: int = 64
    mask: str = "norm"
    match: str = "norm"
    density: float | None = None
    rho: float = 0.5
    rule: Literal["l2", "linf", "elementwise_l2", "elementwise_linf", "layerwise_l2", "layerwise_linf"] = "l2"
    eta: float | None = None
    bias: Literal["identity", "adaptive"] = "identity"
    norm_scope: Literal["masked", "full"] = "masked"
    norm_statistics: Literal["first", "second", "both"] = "first"
    score_images: int = 128
    seed: int = 0
    tuning: bool = False
    measure_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("score_images", 1), ("measure_every", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "rho"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be a finite number >= 0, got {value}")
            object.__setattr__(self, name, float(value))  # 1 and 1.0 are one run, also in a digest
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(unknown_name(name, str(getattr(self, name)), known))
        if self.norm_scope == "full" and self.rule.endswith("linf"):
            raise InputError(f"norm_scope full has no meaning for rule {self.rule}, whose step has no norm")
        self.sam_rule()
        object.__setattr__(self, "mask", str(MaskSpec.parse(self.mask)))
        object.__setattr__(self, "match", str(MaskSpec.parse(self.match)))
        if self.density is not None and not 0 <= self.density <= 1:
            raise InputError(f"density must lie between 0 and 1, got {self.density}")

    def sam_rule(self) -> Rule:
        """The perturbation rule; raises InputError for an eta that the rule does not take."""
        return Rule.named(self.rule, eta=self.eta, bias=self.bias)

    def measures_after(self, epoch: int) -> bool:
        """Whether the weights are measured after this epoch, counted from 0."""
        return self.measure_every > 0 and (epoch + 1) % self.measure_every == 0

    def resolved(self) -> RunConfig:
        """The same with the defaults that depend on the data set filled in."""
        digits = self.data == "digits"
        return replace(
            self,
            n_train=400 if self.n_train is None and digits else self.n_train,
            n_val=300 if self.n_val is None and digits else self.n_val,
            label_noise=(0.2 if digits else 0.0) if self.label_noise is None else self.label_noise,
        )

    def digest(self, content: Mapping[str, str]) -> str:
        """Name of the run: hash of the configuration and of the digests of what it refers to.

        Args:
            content: digests of data, plugins and user code, by name.
        """
        return _digest({"config": asdict(self), "content": dict(content)})


@dataclass(frozen=True)
class Arm:
    """One line of a comparison.

    Args:
        name: shown in tables; runs of different arms are paired by seed.
        mask: as in a run.
        rho: radii to choose from on validation data; empty for an arm without a perturbation.
        epochs_factor: multiplies the number of epochs (2: the compute of SAM for the base optimizer).
        role: "main" arms and "control" arms are two families for the correction of p values.
    """

    name: str
    mask: str
    rho: tuple[float, ...] = ()
    epochs_factor: int = 1
    role: Literal["main", "control"] = "main"

    def __post_init__(self) -> None:
        spec = MaskSpec.parse(self.mask)
        object.__setattr__(self, "mask", str(spec))
        if (spec.name == "none") != (not self.rho):
            raise InputError(
                f"arm {self.name}: mask none takes no rho grid, every other mask needs one; got {self.rho}"
            )
        if len(set(self.rho)) != len(self.rho) or any(not (math.isfinite(r) and r >= 0) for r in self.rho):
            raise InputError(f"arm {self.name}: rho must be distinct finite numbers >= 0, got {list(self.rho)}")
        object.__setattr__(self, "rho", tuple(float(r) for r in self.rho))
        if self.epochs_factor < 1:
            raise InputError(f"arm {self.name}: epochs_factor must be at least 1, got {self.epochs_factor}")
        if self.name == BASELINE and (spec.name != "none" or self.epochs_factor != 1):
            raise InputError(f"the arm called {BASELINE!r} is the base optimizer that all others are compared with")


DECIDED = ("mask", "rho", "seed", "tuning")
"""Settings of a run that a comparison decides."""
_MOST_SEEDS = 10_000

OTHER_RHO = (0.5, 1.0, 2.0, 4.0)
"""The grid of a mask that is named on the command line and is not an arm."""
# Chosen so that the best radius of each default arm lies inside its grid.
DENSE_RHO = (0.05, 0.1, 0.2, 0.4)
SPARSE_RHO = (0.25, 0.5, 1.0, 2.0)

DEFAULT_ARMS = (
    Arm(BASELINE, "none"),
    Arm("none_2x", "none", epochs_factor=2, role="control"),
    Arm("all", "all", DENSE_RHO),
    Arm("no_norm", "no_norm", DENSE_RHO, role="control"),
    Arm("norm", "norm", SPARSE_RHO),
    Arm("random", "random", (0.5, 1.0, 2.0, 4.0)),
    Arm("random_depth", "random_depth", (0.125, 0.25, 0.5, 1.0)),
    Arm("magnitude", "magnitude:exclude_norm=true", SPARSE_RHO),
    Arm("fisher", "fisher:exclude_norm=true", (0.1, 0.2, 0.4, 0.8)),
)


@dataclass(frozen=True)
class CompareConfig(RunConfig):
    """A comparison of arms, paired over seeds.

    The settings of a run that an arm or a seed decides (mask, rho, seed, tuning) cannot be set.

    Args:
        arms: the arms, for configuration files; the arm called "none" is the baseline.
        masks: choose arms on the command line, separated by commas: names of arms (of the default ones, magnitude
            and fisher keep no normalization weights), or masks as in a run.
        rho_grid: radii to choose from in every arm, separated by commas (default: those of the arm; 0.5,1,2,4
            for masks named in `masks` that are not arms).
        seeds: number of seeds of the report.
        first_seed: the first of them; they are consecutive.
        tuning_seeds: number of seeds on which each radius is tried; other seeds than the report's.
    """

    arms: tuple[Arm, ...] = DEFAULT_ARMS
    masks: str | None = None
    rho_grid: str | None = None
    seeds: int = 8
    first_seed: int = 0
    tuning_seeds: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in DECIDED:
            if getattr(self, name) != getattr(RunConfig, name):
                raise InputError(f"a comparison takes {name} from its arms and seeds; leave {name} out")
        for name in ("seeds", "tuning_seeds"):
            if not 1 <= getattr(self, name) <= _MOST_SEEDS:
                raise InputError(f"{name} must be from 1 to {_MOST_SEEDS}, got {getattr(self, name)}")
        arms = self._chosen()
        names = [arm.name for arm in arms]
        if len(set(names)) != len(names):
            raise InputError(
                f"two arms have the same name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
            )
        if BASELINE not in names:
            arms = (Arm(BASELINE, "none"), *arms)
        if len(arms) < 2:
            raise InputError(f"nothing to compare with the arm {BASELINE!r}; name at least one mask")
        grids = {len(arm.rho) for arm in arms if arm.rho}
        if len(grids) > 1:
            raise InputError(f"every arm must have as many radii to choose from; found grids of {sorted(grids)}")
        object.__setattr__(self, "arms", arms)
        object.__setattr__(self, "masks", None)
        object.__setattr__(self, "rho_grid", None)

    def _chosen(self) -> tuple[Arm, ...]:
        """The arms after `masks` and `rho_grid`."""
        grid = None
        if self.rho_grid is not None:
            try:
                grid = tuple(float(text) for text in self.rho_grid.split(","))
            except ValueError:
                raise InputError(f"rho_grid must be numbers separated by commas, got {self.rho_grid!r}") from None
        arms = tuple(self.arms)
        if self.masks is not None:
            by_name = {arm.name: arm for arm in arms}
            specs = [text.strip() for text in self.masks.split(",")]
            arms = tuple(by_name[s] if s in by_name else _arm_of(s, grid or OTHER_RHO) for s in specs)
        return arms if grid is None else tuple(replace(arm, rho=grid) if arm.rho else arm for arm in arms)

    def run(self, arm: Arm, *, rho: float, seed: int, tuning: bool) -> RunConfig:
        """The configuration of one run of an arm."""
        shared = {f.name: getattr(self, f.name) for f in fields(RunConfig)}
        own = {"mask": arm.mask, "rho": rho, "seed": seed, "tuning": tuning, "epochs": self.epochs * arm.epochs_factor}
        if tuning:
            own["measure_every"] = 0
        return RunConfig(**{**shared, **own}).resolved()

    def report_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def seeds_for_tuning(self) -> range:
        """Seeds that the report does not use, however many it has."""
        return range(self.first_seed + _MOST_SEEDS, self.first_seed + _MOST_SEEDS + self.tuning_seeds)

    def digest(self, content: Mapping[str, str]) -> str:
        """Hash of the resolved comparison; the choice on the command line is already in the arms."""
        return _digest({"config": self.settings(), "content": dict(content)})

    def settings(self) -> dict[str, Any]:
        """The resolved comparison as a configuration file would say it."""
        skipped = {*DECIDED, "masks", "rho_grid"}
        return {name: value for name, value in asdict(self).items() if name not in skipped}


def _arm_of(spec: str, grid: tuple[float, ...]) -> Arm:
    return Arm(spec, spec, () if MaskSpec.parse(spec).name == "none" else grid)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def default_processes() -> int:
    """How many processes may run at once: the cores that this process may use, a container's quota included."""
    return int(joblib.cpu_count())
