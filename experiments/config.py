"""Configurations: what a run is, and what a comparison of arms is. Plain frozen data, no behaviour of training."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import joblib

from experiments.augment import Augmentation
from experiments.schedule import OptimizerSpec, Window
from masks.errors import InputError, unknown_name
from masks.spec import MaskSpec
from sam import Method, MethodSpec, method_info
from sam.method import Data
from sam.perturbation import RULE_NAMES, Rule

BASELINE = "none"
"""Name of the arm that every other arm is compared with: the base optimizer."""


_CHOICES = {
    "schedule": ("cosine", "step", "constant"),
    "trainable": ("all", "norm", "no_norm"),
    "rule": RULE_NAMES,
    "bias": ("identity", "adaptive"),
    "norm_scope": ("", "masked", "full"),
    "norm_statistics": ("first", "second", "both"),
    "precision": ("float32", "bf16"),
    "ascent_gradient": ("replica", "synchronised"),
}
"""Settings with a fixed list of values; an unknown one must not fall through to some default."""


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Args:
        data: digits, a torchvision image set by name (cifar10, fashion_mnist, ...), folder:DIR, stream:DIR@SIZE (a
            folder larger than memory, decoded when needed) or npz:FILE.
        n_train: number of training images (default: 400 for digits, else what n_val leaves of the images that
            rho may be chosen on: the training split, or 40 % of a data set without a test split of its own).
        n_val: number of validation images (default: 300 for digits, else a fifth of those images).
        n_test: number of test images (default: the whole test split, or a third of a data set without one).
        label_noise: share of training labels redrawn at random (default: 0.2 for digits, else 0).
        model: resnet_small, vit_small, mlp, torchvision:NAME or module:function of your own.
        width: width of a built-in model (default: its own).
        optimizer: base optimizer: sgd, adamw or any class of torch.optim, as name[:option=value...].
        lr: peak learning rate.
        schedule: of the learning rate over the steps: cosine to 0, step (a tenth after half of them, a hundredth after
            three quarters), or constant.
        warmup: epochs in which it first grows linearly.
        momentum: momentum of sgd.
        weight_decay: weight decay of the base optimizer.
        norm_weight_decay: whether it also acts on normalization parameters.
        clip_grad_norm: largest norm of the gradient that the base optimizer steps with.
        label_smoothing: of the training loss; evaluation is without.
        augment: of training images, such as crop+flip+cutout=16, or resized_crop+flip for stream:; none for none.
        trainable: which parameters are trained: all, norm (the normalization layers' alone) or no_norm (theirs are
            frozen); the others keep their initial values, and no mask keeps them.
        epochs: passes over the training images.
        batch_size: images per step, those of all processes together; the last batch of an epoch has those that are
            left, the same number for each process, and is left out where that would be less than 2.
        method: member of the SAM family, as name[:option=value...]; see `sam-masks methods`.
        mask: which coordinates are perturbed, as `name[:option=value...][@schedule]`; see `sam-masks masks` (default:
            norm, or the method's own).
        sam_epochs: perturb only in these epochs, as START..END, counted from 0, END not included (default: all).
        match: a budgeted mask keeps as many coordinates as this mask of natural size.
        density: a budgeted mask keeps this fraction instead of matching.
        rho: radius of the perturbation.
        rho_min: let the radius follow the learning rate, from rho at its peak to this at 0 (GSAM's schedule).
        rule: metric and norm of the perturbation, for methods without one of their own.
        eta: floor of an adaptive rule (default: the rule's own).
        bias: whether an adaptive rule scales biases ("adaptive") or not ("identity").
        norm_scope: normalise the gradient over the mask (masked), or over all parameters before masking (full)
            (default: masked, or the method's own).
        norm_statistics: pass in which running statistics of normalization layers are updated.
        precision: of the model's forward and backward passes in training: float32, or bf16 (autocast to bfloat16).
            Weights, perturbation, loss, masks and all measurements are in float32 under both.
        channels_last: how images and the weights of convolutions lie in memory: channels last, which is faster on CPUs
            and tensor cores, or (false) contiguous. Numbers differ by roundings.
        score_images: training images that a score mask is scored on; drawn with the seed, the same in every arm.
        seed: seed of the run; every purpose has a stream of its own, so runs of a seed are paired.
        tuning: train and validate on the development images only and leave the test images alone.
        measure_every: measure fit and flatness along training, too, after so many epochs each time; 0 for at the end
            only. Training is bitwise the same.
        world_size: processes that train the model together, each on its shard of every batch; the launcher (torchrun)
            decides it, and another value is refused.
        ascent_gradient: with several processes, whether each ascends along the gradient of its own shard (replica) or
            all along that of the whole batch (synchronised); with one they are the same.
        cuda_graph: record a step and replay it, for small models on a GPU; the learning rate is then a float32.
    """

    data: str = "digits"
    n_train: int | None = None
    n_val: int | None = None
    n_test: int | None = None
    label_noise: float | None = None
    model: str = "resnet_small"
    width: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.05
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: int = 0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    norm_weight_decay: bool = True
    clip_grad_norm: float | None = None
    label_smoothing: float = 0.0
    augment: str = "none"
    trainable: Literal["all", "norm", "no_norm"] = "all"
    epochs: int = 20
    batch_size: int = 64
    method: str = "sam"
    mask: str = ""
    sam_epochs: str = ""
    match: str = "norm"
    density: float | None = None
    rho: float = 0.5
    rho_min: float | None = None
    rule: Literal["l2", "linf", "elementwise_l2", "elementwise_linf", "layerwise_l2", "layerwise_linf"] = "l2"
    eta: float | None = None
    bias: Literal["identity", "adaptive"] = "identity"
    norm_scope: Literal["", "masked", "full"] = ""
    norm_statistics: Literal["first", "second", "both"] = "first"
    precision: Literal["float32", "bf16"] = "float32"
    channels_last: bool = True
    score_images: int = 128
    seed: int = 0
    tuning: bool = False
    measure_every: int = 0
    world_size: int | None = None
    ascent_gradient: Literal["replica", "synchronised"] = "replica"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("score_images", 1), ("measure_every", 0), ("warmup", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        self._check_shards()
        for name in ("lr", "momentum", "weight_decay", "rho"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be a finite number >= 0, got {value}")
        for name in (
            "lr",
            "momentum",
            "weight_decay",
            "rho",
            "rho_min",
            "clip_grad_norm",
            "label_smoothing",
            "density",
        ):
            if getattr(self, name) is not None:  # 1 and 1.0 are one run, also in a digest
                object.__setattr__(self, name, float(getattr(self, name)))
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(unknown_name(name, str(getattr(self, name)), known))
        if self.clip_grad_norm is not None and not (math.isfinite(self.clip_grad_norm) and self.clip_grad_norm > 0):
            raise InputError(f"clip_grad_norm must be a positive finite number, got {self.clip_grad_norm}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.rho_min is not None and not 0 <= self.rho_min <= self._smallest_rho():
            raise InputError(f"rho_min must lie between 0 and rho={self._smallest_rho():g}, got {self.rho_min:g}")
        if self.warmup >= self.epochs:
            raise InputError(f"warmup must be shorter than the run: {self.warmup} of {self.epochs} epochs")
        for name, kind in (("optimizer", OptimizerSpec), ("augment", Augmentation), ("method", MethodSpec)):
            object.__setattr__(self, name, str(kind.parse(getattr(self, name))))
        method = self.sam_method()
        self._check_ascent(method)
        self._take_presets()
        if method.rule.p == math.inf and self.norm_scope == "full":
            raise InputError("norm_scope full has no meaning for p = infinity, whose step has no norm")
        object.__setattr__(self, "sam_epochs", str(self.window()))
        if self.window().start >= self.epochs:
            raise InputError(f"sam_epochs {self.sam_epochs} begins after the run, which has {self.epochs} epochs")
        try:
            object.__setattr__(self, "match", str(MaskSpec.parse(self.match)))
        except InputError as error:
            raise InputError(f"match: {error}") from None
        if self.density is not None and not 0 <= self.density <= 1:
            raise InputError(f"density must lie between 0 and 1, got {self.density}")

    def _check_shards(self) -> None:
        size = 1 if self.world_size is None else self.world_size
        if size < 1:
            raise InputError(f"world_size must be at least 1, got {size}")
        if self.batch_size % size or self.batch_size < 2 * size:
            raise InputError(
                f"batch_size is that of all processes together and must give each of {size} as many images, at least "
                f"2; got {self.batch_size}"
            )

    def _check_ascent(self, method: Method) -> None:
        """Refuse a gradient of the whole batch for a method that divides the batch: each process has its shard only."""
        synchronised = (self.world_size or 1) > 1 and self.ascent_gradient == "synchronised"
        if synchronised and type(method.data) is not Data:
            raise InputError(
                f"method {self.method} chooses or divides the examples of a batch, and each of {self.world_size} "
                "processes has its shard only: ascent_gradient synchronised would not be the run in one process; use "
                "replica"
            )

    def _smallest_rho(self) -> float:
        return self.rho

    def _take_presets(self) -> None:
        """Fill in what the method fixes, and the defaults of what it does not."""
        preset = MethodSpec.parse(self.method).preset
        for name, default in (("mask", "norm"), ("norm_scope", "masked")):
            given, own = getattr(self, name), preset.get(name)
            if name == "mask":
                given, own = (str(MaskSpec.parse(text)) if text else text for text in (given, own))
            if own is not None and given not in ("", own):
                raise InputError(f"method {self.method} has a {name} of its own ({own}); leave {name} out, got {given}")
            object.__setattr__(self, name, given or own or default)

    def sam_method(self) -> Method:
        """The method with the rule that was asked for; not yet prepared for a model.

        Raises:
            InputError: an option out of range, an eta that the rule does not take, or a rule for a method that has one.
        """
        method, rule = MethodSpec.parse(self.method).build(), Rule.named(self.rule, eta=self.eta, bias=self.bias)
        if rule == Rule():
            return method
        if method.rule != Rule():
            raise InputError(f"method {self.method} has a rule of its own; leave rule, eta and bias out")
        return replace(method, rule=rule)

    def window(self) -> Window:
        """The epochs in which weights are perturbed."""
        return Window.parse(self.sam_epochs)

    def measures_after(self, epoch: int) -> bool:
        """Whether the weights are measured after this epoch, counted from 0."""
        return self.measure_every > 0 and (epoch + 1) % self.measure_every == 0

    def resolved(self) -> RunConfig:
        """The same with the defaults filled in that depend on the data set or on other settings."""
        digits = self.data == "digits"
        world_size = 1 if self.world_size is None else self.world_size
        return replace(
            self,
            world_size=world_size,
            ascent_gradient=self.ascent_gradient if world_size > 1 else "replica",
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


PERTURBATION_SETTINGS = ("bias", "eta", "norm_scope", "norm_statistics", "rho_min", "rule", "sam_epochs")
UPDATE_SETTINGS = (
    *("clip_grad_norm", "label_smoothing", "lr", "momentum", "norm_weight_decay", "optimizer", "schedule"),
    *("trainable", "warmup", "weight_decay"),
)
"""Settings that an arm may have of its own: of the perturbation, and of what the base optimizer steps on."""
# The others are what runs of a seed are paired by (data, splits, label noise, augmentation, model, batches), what
# masks are matched by (match, density, score_images), or have a place of their own in an arm or a comparison.


@dataclass(frozen=True)
class Arm:
    """One line of a comparison.

    Args:
        name: shown in tables; runs of different arms are paired by seed.
        mask: as in a run; empty for the method's own.
        method: as in a run; empty for that of the comparison.
        rho: radii to choose from on validation data; empty for an arm without a perturbation.
        epochs_factor: multiplies the number of epochs (2: the compute of SAM for the base optimizer).
        role: "main" arms and "control" arms are two families for the correction of p values.
        settings: training settings that this arm has otherwise than the comparison, by name: of the perturbation
            (bias, eta, norm_scope, norm_statistics, rho_min, rule, sam_epochs) and of the update (clip_grad_norm,
            label_smoothing, lr, momentum, norm_weight_decay, optimizer, schedule, trainable, warmup, weight_decay).
    """

    name: str
    mask: str
    rho: tuple[float, ...] = ()
    epochs_factor: int = 1
    role: Literal["main", "control"] = "main"
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        preset: Mapping[str, str] = {}
        if self.method:
            method = MethodSpec.parse(self.method)
            object.__setattr__(self, "method", str(method))
            preset = method.preset
        spec = MaskSpec.parse(self.mask or preset.get("mask", ""))
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
        object.__setattr__(self, "settings", self._own_settings())
        if self.name == BASELINE and (spec.name != "none" or self.epochs_factor != 1 or self.settings):
            raise InputError(f"the arm called {BASELINE!r} is the base optimizer that all others are compared with")

    def _own_settings(self) -> dict[str, Any]:
        """The settings in the order of their names, whole numbers as floats where the setting is one."""
        allowed, hints = (*PERTURBATION_SETTINGS, *UPDATE_SETTINGS), get_type_hints(RunConfig)
        out: dict[str, Any] = {}
        for name, value in sorted(self.settings.items()):
            if name not in allowed:
                if name not in hints:
                    raise InputError(f"arm {self.name}: {unknown_name('setting', name, allowed)}")
                raise InputError(
                    f"arm {self.name}: settings cannot hold {name}: runs are paired or matched by it, or it has a "
                    f"place of its own; an arm may set {', '.join(sorted(allowed))}"
                )
            if name in PERTURBATION_SETTINGS and not self.rho:
                raise InputError(f"arm {self.name}: mask none perturbs nothing; leave {name} out of its settings")
            kinds = {str if isinstance(kind, str) else kind for kind in get_args(hints[name]) or (hints[name],)}
            out[name] = float(value) if type(value) is int and float in kinds else value
            if type(out[name]) not in kinds:
                wanted = " or ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in kinds))
                raise InputError(f"arm {self.name}: {name} must be {wanted}, got {value!r}")
        return out


DECIDED = ("mask", "rho", "seed", "tuning", "world_size", "ascent_gradient")
"""Settings of a run that a comparison decides; its runs are of one process each."""
_MOST_SEEDS = 10_000
_MOST_EXTENSIONS = 12

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

    The settings of a run that an arm or a seed decides (mask, rho, seed, tuning) cannot be set, nor those of runs over
    several processes.

    Args:
        arms: the arms, for configuration files: name, mask, rho, epochs_factor, role, method, settings; the arm called
            "none" is the baseline.
        methods: every arm under each of these methods, separated by commas (arms are then called METHOD/ARM; grids are
            those of the arms times the method's default radius over SAM's).
        masks: choose arms on the command line, separated by commas: names of arms (of the default ones, magnitude
            and fisher keep no normalization weights), or masks as in a run.
        rho_grid: radii to choose from in every arm, separated by commas (default: those of the arm; 0.5,1,2,4
            for masks named in `masks` that are not arms).
        extend: how many radii each arm may try beyond its grid: while the best one of some arm is the smallest or the
            largest that it tried, every arm tries one more, beyond that end, or between the best one and its better
            neighbour.
        seeds: number of seeds of the report.
        first_seed: the first of them; they are consecutive.
        tuning_seeds: number of seeds on which each radius is tried; other seeds than the report's.
    """

    arms: tuple[Arm, ...] = DEFAULT_ARMS
    methods: str | None = None
    masks: str | None = None
    rho_grid: str | None = None
    extend: int = 0
    seeds: int = 8
    first_seed: int = 0
    tuning_seeds: int = 2

    def __post_init__(self) -> None:
        for name in DECIDED:
            if getattr(self, name) != getattr(RunConfig, name):
                if name in ("world_size", "ascent_gradient"):
                    raise InputError(f"the runs of a comparison are of one process each; leave {name} out")
                raise InputError(f"a comparison takes {name} from its arms and seeds; leave {name} out")
        norm_scope = self.norm_scope
        super().__post_init__()
        if "mask" in MethodSpec.parse(self.method).preset:
            raise InputError(f"method {self.method} has a mask of its own; compare it with methods={self.method}")
        # Only what was given: arms may have methods with a norm scope of their own.
        object.__setattr__(self, "mask", RunConfig.mask)
        object.__setattr__(self, "norm_scope", norm_scope)
        for name in ("seeds", "tuning_seeds"):
            if not 1 <= getattr(self, name) <= _MOST_SEEDS:
                raise InputError(f"{name} must be from 1 to {_MOST_SEEDS}, got {getattr(self, name)}")
        if not 0 <= self.extend <= _MOST_EXTENSIONS:
            raise InputError(f"extend must be from 0 to {_MOST_EXTENSIONS}, got {self.extend}")
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
        self._check_runs(arms)
        object.__setattr__(self, "arms", arms)
        object.__setattr__(self, "methods", None)
        object.__setattr__(self, "masks", None)
        object.__setattr__(self, "rho_grid", None)

    def _check_runs(self, arms: tuple[Arm, ...]) -> None:
        """Every arm has runs that can be had and that are no other arm's: records know one arm only."""
        known: dict[RunConfig, str] = {}
        for arm in arms:
            for rho in arm.rho or (0.0,):
                try:
                    run = self.run(arm, rho=rho, seed=self.first_seed, tuning=False)
                except InputError as error:
                    raise InputError(f"arm {arm.name}: {error}") from None
                if known.setdefault(run, arm.name) != arm.name:
                    raise InputError(f"arms {known[run]} and {arm.name} are the same run at rho {rho:g}; leave one out")

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
        if self.methods is not None:
            if self.method != RunConfig.method:
                raise InputError(f"give method or methods, not both; got {self.method} and {self.methods}")
            arms = _under_methods(arms, [text.strip() for text in self.methods.split(",")])
        return arms if grid is None else tuple(replace(arm, rho=grid) if arm.rho else arm for arm in arms)

    def _smallest_rho(self) -> float:
        return min((rho for arm in self._chosen() for rho in arm.rho if rho), default=0.0)

    def run(self, arm: Arm, *, rho: float, seed: int, tuning: bool) -> RunConfig:
        """The configuration of one run of an arm."""
        shared = {f.name: getattr(self, f.name) for f in fields(RunConfig)} | arm.settings
        own = {"mask": arm.mask, "rho": rho, "seed": seed, "tuning": tuning, "epochs": self.epochs * arm.epochs_factor}
        if arm.method:
            own["method"] = arm.method
        if not arm.rho:
            own["method"] = RunConfig.method  # the base optimizer
        if MaskSpec.parse(arm.mask).info.kind == "natural":  # the same run whatever the others' count
            own |= {"density": None, "match": RunConfig.match}
        if not rho:
            own["rho_min"] = None
        if tuning:
            own["measure_every"] = 0
        return RunConfig(**{**shared, **own}).resolved()

    def report_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def seeds_for_tuning(self) -> range:
        """Seeds that the report does not use, however many it has."""
        return range(self.first_seed + _MOST_SEEDS, self.first_seed + _MOST_SEEDS + self.tuning_seeds)

    def digest(self, content: Mapping[str, str]) -> str:
        """Hash of the resolved comparison; the choice on the command line is already in the arms. One that is extended
        later is still the same."""
        asked = {name: value for name, value in self.settings().items() if name != "extend"}
        return _digest({"config": asked, "content": dict(content)})

    def settings(self) -> dict[str, Any]:
        """The resolved comparison as a configuration file would say it."""
        skipped = {*DECIDED, "methods", "masks", "rho_grid"}
        found = {name: value for name, value in asdict(self).items() if name not in skipped}
        for arm in found["arms"]:
            if not arm["settings"]:
                del arm["settings"]
        return found


def _arm_of(spec: str, grid: tuple[float, ...]) -> Arm:
    return Arm(spec, spec, () if MaskSpec.parse(spec).name == "none" else grid)


def _under_methods(arms: tuple[Arm, ...], methods: list[str]) -> tuple[Arm, ...]:
    """The arms without a perturbation, and every other one under each method (those with a mask of their own: once)."""
    for arm in arms:
        if arm.method:
            raise InputError(f"arm {arm.name} has a method of its own ({arm.method}); leave methods out")
    out = [arm for arm in arms if not arm.rho]
    dense = next((arm for arm in arms if arm.mask == "all"), None)
    for text in methods:
        spec = MethodSpec.parse(text)
        factor = spec.info.rho / method_info("sam").rho
        if "mask" in spec.preset:
            out.append(Arm(str(spec), "", _times(dense.rho if dense else DENSE_RHO, factor), method=text))
            continue
        for arm in arms:
            if arm.rho:
                out.append(replace(arm, name=f"{spec}/{arm.name}", rho=_times(arm.rho, factor), method=text))
    if not any(arm.rho for arm in out):
        raise InputError(f"no mask for the methods {', '.join(methods)}; name at least one")
    return tuple(out)


def _times(grid: tuple[float, ...], factor: float) -> tuple[float, ...]:
    return tuple(float(f"{rho * factor:.6g}") for rho in grid)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def default_processes() -> int:
    """How many processes may run at once: the cores that this process may use, a container's quota included."""
    return int(joblib.cpu_count())
