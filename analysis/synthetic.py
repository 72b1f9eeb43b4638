"""Synthetic studies of known truth, to see whether the verdict errs no more often than it says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from masks.errors import InputError, unknown_name

Mechanism = Literal["full", "half", "none", "confounded_runs", "confounded_sweep", "confounded_all"]

SHARE = {"full": 1.0, "half": 0.5, "none": 0.0, "confounded_runs": 0.0, "confounded_sweep": 0.0, "confounded_all": 0.0}
CAUSE_R2 = 0.8  # share of the runs' variation of flatness that the common cause makes


@dataclass(frozen=True)
class StudyDesign:
    """How a study is drawn. Gains and errors are in percentage points, flatness is minus log sharpness.

    Flatness of a run: its arm's and radius's mean, plus normal parts of the seed and of the run. Gain of a run: a
    normal part of the seed, a normal part of the run, and

    - "full", "half", "none": ``slope * flatness + curvature * (flatness - middle)^2``, where the slope makes that
      share (1, 1/2, 0) of ``gain``, plus the rest of ``gain`` directly;
    - "confounded_runs": all of ``gain`` directly, and a cause of the run that moves flatness and gain as "full" would;
    - "confounded_sweep": what "full" would make, but of the mean flatness of arm and radius: rho and mask act by
      another way, and flatness only goes along;
    - "confounded_all": both; sharpness is a mere sign of the cause everywhere.

    Args:
        mechanism: the truth.
        seeds: number of seeds.
        radii: number of radii of each arm, each ``2^(1/2)`` times the one before, the middle one chosen.
        arms: number of arms, evenly spaced between the reference ``arm0`` and the last one, which has all the gain.
        gain: of the last arm over the reference at the chosen radii.
        flattening: of the same contrast, log units.
        step: flattening from one radius to the next.
        curvature: points per squared unit of flatness; below 0 error is U-shaped along the sweep.
        reliability: of one measurement, in (0, 1].
        scope: between which runs: "sweep", those of a seed; "cell", those of the same arm and radius.
        run_sd: true variation of flatness between such runs, log units.
        seed_flatness_sd: of the seeds' part of flatness.
        seed_sd: of the seeds' part of the gain, shared by all arms.
        noise_sd: of the runs' part of the gain; a difference of two arms varies by ``2^(1/2)`` times as much.
        test_images: round the test error to a whole number of so many, so that there are ties; 0 for no rounding.
        baseline: the reference has one radius only, rho = 0, of the flatness and gain of its chosen one.
    """

    mechanism: Mechanism = "full"
    seeds: int = 8
    radii: int = 6
    arms: int = 2
    gain: float = 0.6
    flattening: float = 0.5
    step: float = 0.3
    curvature: float = 0.0
    reliability: float = 0.8
    scope: Literal["sweep", "cell"] = "sweep"
    run_sd: float = 0.15
    seed_flatness_sd: float = 0.15
    seed_sd: float = 0.2
    noise_sd: float = 0.2
    test_images: int = 0
    baseline: bool = False

    def __post_init__(self) -> None:
        if self.mechanism not in SHARE:
            raise InputError(unknown_name("mechanism", self.mechanism, SHARE))
        if self.scope not in ("sweep", "cell") or not 0 < self.reliability <= 1:
            raise InputError(f"need 0 < reliability <= 1 of a known scope, got {self.reliability} of {self.scope!r}")
        if self.seeds < 1 or self.radii < 1 or self.arms < 2:
            raise InputError(f"need seeds, radii >= 1 and arms >= 2, got {self.seeds}, {self.radii} and {self.arms}")
        if not self.flattening and self.mechanism != "none":
            raise InputError(f"a gain by {self.mechanism!r} needs a flattening, got 0")

    @property
    def slope(self) -> float:
        """Points per unit of flatness that would make the gain, or the share that is to go through sharpness."""
        share = SHARE[self.mechanism] if not self.mechanism.startswith("confounded") else 1.0
        return share * self.gain / self.flattening if share else 0.0

    @property
    def error_sd(self) -> float:
        """Standard deviation of the error of one measurement, log units."""
        within = self.run_sd**2
        if self.scope == "sweep":
            within += float(np.var(self._means()[:: self.arms - 1], ddof=1))
        return math.sqrt(within * (1 - self.reliability) / self.reliability)

    @property
    def slope_of_cause(self) -> float:
        """Points per standard deviation of the common cause of the runs; 0 without one."""
        if self.mechanism not in ("confounded_runs", "confounded_all"):
            return 0.0
        return self.slope * self.run_sd / math.sqrt(CAUSE_R2)

    @property
    def cause_gain_r2(self) -> float:
        """Share of the gain's variance given flatness, between runs of a cell, that the common cause explains."""
        left = self.slope_of_cause**2 * (1 - CAUSE_R2)
        return left / (left + self.noise_sd**2)

    @property
    def chosen(self) -> dict[str, float]:
        """The radius of each arm at which the gain is reported."""
        chosen = {f"arm{j}": self._rho(self.radii // 2) for j in range(self.arms)}
        return chosen | {"arm0": 0.0} if self.baseline else chosen

    def _rho(self, r: int) -> float:
        return round(0.02 * 2 ** (r / 2), 6)

    def _means(self) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """Mean flatness of each arm and radius, relative to the reference's chosen one, shape (arms, radii)."""
        steps = self.step * (np.arange(self.radii) - self.radii // 2)
        return np.asarray(np.linspace(0, self.flattening, self.arms)[:, None] + steps)

    def draw(self, seed: int) -> pd.DataFrame:
        """A study: one row per run, with the metric ``sharpness``, measured twice, and ``decoy``, a metric of nothing.

        Args:
            seed: of all that is random.
        """
        rng = np.random.default_rng(seed)
        means = self._means()[None]
        shape = (self.seeds, self.arms, self.radii)
        seed_shape = (self.seeds, 1, 1)
        cause, own = rng.standard_normal((2, *shape))
        run = self.run_sd * (math.sqrt(CAUSE_R2) * cause + math.sqrt(1 - CAUSE_R2) * own)
        flatness = means + self.seed_flatness_sd * rng.standard_normal(seed_shape) + run
        acts = means if self.mechanism.startswith("confounded") else flatness
        gain = self.curvature * (acts - self.flattening / 2) ** 2 + self.slope_of_cause * cause
        if self.mechanism != "confounded_runs":
            gain = gain + self.slope * acts
        direct = self.gain * (1 - SHARE[self.mechanism]) if self.mechanism in ("half", "none", "confounded_runs") else 0
        gain = gain + direct * np.linspace(0, 1, self.arms)[:, None]
        gain = gain + self.seed_sd * rng.standard_normal(seed_shape) + self.noise_sd * rng.standard_normal(shape)
        measured = -flatness[None] + self.error_sd * rng.standard_normal((2, *shape))
        decoy = rng.standard_normal((2, *shape))
        s, a, r = (index.ravel() for index in np.indices(shape))
        error = (20 - gain.ravel()) / 100
        frame = pd.DataFrame(
            {
                "arm": [f"arm{j}" for j in a],
                "seed": s,
                "rho": [self._rho(j) for j in r],
                "test_error": np.round(error * self.test_images) / self.test_images if self.test_images else error,
                "train_error": 0.01 + 0.001 * rng.random(s.size),
                "train_loss": 0.05 + 0.01 * r + 0.002 * rng.random(s.size),
                "weight_norm": 30 + rng.random(s.size),
                "sharpness": np.exp(measured[0].ravel()),
                "sharpness_repeat": np.exp(measured[1].ravel()),
                "decoy": np.exp(decoy[0].ravel()),
                "decoy_repeat": np.exp(decoy[1].ravel()),
            }
        )
        if not self.baseline:
            return frame
        chosen = frame["rho"] == self._rho(self.radii // 2)
        return frame[(frame["arm"] != "arm0") | chosen].assign(
            rho=lambda kept: kept["rho"].where(kept["arm"] != "arm0", 0)
        )
