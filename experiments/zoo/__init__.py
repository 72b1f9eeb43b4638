"""The built-in architectures, one family per file; :mod:`experiments.models` builds them by name.

Every class takes ``in_channels``, ``image_size`` (height and width in pixels), ``num_classes`` and ``width``, draws its
initial weights from torch's global generator only, and has no random layer. All have second derivatives.
"""
