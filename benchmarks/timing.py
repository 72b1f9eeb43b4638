"""See :mod:`experiments.timing`."""

from experiments.timing import *  # noqa: F403
from experiments.timing import Step as Step, environment as environment, measure as measure
