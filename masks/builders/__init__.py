"""The built-in masks, one file per family; importing this package registers them."""

from masks.builders import dense, fisher, gradient, magnitude, norm, parameters, random

__all__ = ["dense", "fisher", "gradient", "magnitude", "norm", "parameters", "random"]
