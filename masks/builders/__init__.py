"""The built-in masks, one file per family; importing this package registers them."""

from masks.builders import dense, dynamic, file, fisher, gradient, magnitude, norm, parameters, random

__all__ = ["dense", "dynamic", "file", "fisher", "gradient", "magnitude", "norm", "parameters", "random"]
