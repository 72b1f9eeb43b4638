"""The members of the family: one file and one registration each. Importing this package registers all of them."""

from sam.methods import asam, sam

__all__ = ["asam", "sam"]
