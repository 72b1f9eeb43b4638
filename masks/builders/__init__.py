"""The built-in masks, one file per family; importing this package registers them."""

from masks.builders import dense, file, fisher, gradient, magnitude, norm, parameters, random

__all__ = ["dense", "file", "fisher", "gradient", "magnitude", "norm", "parameters", "random"]
