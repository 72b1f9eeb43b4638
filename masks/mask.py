"""The mask: which coordinates of a model's parameters are perturbed."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from masks.errors import MaskError, MaskFileError
from masks.notebook import mask_html
from masks.params import ParamRow, ParamTable

Part = bool | Tensor
"""What a mask says of one tensor: all of it, nothing of it, or a boolean tensor of its shape."""

FORMAT = "sam-masks/mask/1"
_NONE, _ALL, _SOME = 0, 1, 2


@dataclass(frozen=True)
class Provenance:
    """How a mask came to be.

    Attributes:
        builder: registry name, or the operation that made it.
        options: the builder's options, all of them.
        seed: seed of the mask's own random stream, where it has one.
        model_digest: state of the model that it was built on (parameters and buffers).
        built_at: when in training it was built: "init", "epoch 3", ...
        kind: "budgeted" or "natural" (size not matched to anything), or "derived".
    """

    builder: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    model_digest: str | None = None
    built_at: str = "init"
    kind: Literal["budgeted", "natural", "derived"] = "derived"


@dataclass(frozen=True)
class LayerCount:
    """How much of one tensor a mask keeps."""

    row: ParamRow
    kept: int

    @property
    def density(self) -> float:
        return self.kept / self.row.numel if self.row.numel else 0.0


@dataclass(frozen=True, eq=False)
class Mask:
    """A set of coordinates of a parameter table; True = this coordinate IS perturbed.

    Args:
        table: the parameters.
        parts: one :data:`Part` per row. A boolean tensor that is all True or all False becomes a plain bool,
            so that equal masks are stored equally; of a tensor without entries nothing is kept (False).
        provenance: how it came to be.

    Two masks are equal if they keep the same coordinates of the same table; provenance does not count.

    Raises:
        MaskError: parts that do not fit the table.
    """

    table: ParamTable
    parts: tuple[Part, ...]
    provenance: Provenance = Provenance("explicit")
    counts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.table):
            raise MaskError(f"{len(self.parts)} parts for {len(self.table)} tensors")
        parts: list[Part] = []
        counts: list[int] = []
        for row, part in zip(self.table, self.parts, strict=True):
            count = 0
            if isinstance(part, Tensor):
                if part.dtype != torch.bool or tuple(part.shape) != row.shape:
                    raise MaskError(
                        f"the part for {row.name} must be a bool tensor of shape {row.shape}, "
                        f"got {part.dtype} of shape {tuple(part.shape)}"
                    )
                count = int(torch.count_nonzero(part))  # a sum makes a copy of eight bytes per entry
                part = part.detach().clone() if 0 < count < row.numel else count > 0
            elif not isinstance(part, bool):
                raise MaskError(f"the part for {row.name} must be a bool or a bool tensor, got {type(part).__name__}")
            if row.numel == 0:
                part = False
            counts.append(count if isinstance(part, Tensor) else row.numel * part)
            parts.append(part)
        object.__setattr__(self, "parts", tuple(parts))
        object.__setattr__(self, "counts", tuple(counts))

    # -- size -----------------------------------------------------------------------------------------------

    @property
    def num_kept(self) -> int:
        """Number of perturbed coordinates."""
        return sum(self.counts)

    @property
    def numel(self) -> int:
        """Number of eligible coordinates."""
        return self.table.numel

    @property
    def density(self) -> float:
        """Fraction perturbed, ``num_kept / numel``."""
        return self.num_kept / self.numel

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return (self.numel - self.num_kept) / self.numel

    @property
    def num_tensors(self) -> int:
        """Number of tensors with at least one perturbed coordinate."""
        return sum(count > 0 for count in self.counts)

    @property
    def norm_share(self) -> float:
        """Fraction of the kept coordinates that belong to normalization layers (nan for an empty mask)."""
        if not self.num_kept:
            return float("nan")
        return sum(c for row, c in zip(self.table, self.counts, strict=True) if row.is_norm) / self.num_kept

    def per_layer(self) -> tuple[LayerCount, ...]:
        """Kept coordinates of every tensor, in table order."""
        return tuple(LayerCount(row, count) for row, count in zip(self.table, self.counts, strict=True))

    def __repr__(self) -> str:
        return (
            f"Mask({self.provenance.builder}: {self.num_kept:,} of {self.numel:,} coordinates, "
            f"density {self.density:.4%}, {self.num_tensors} of {len(self.table)} tensors)"
        )

    def _repr_html_(self) -> str:
        return mask_html(self)

    # -- algebra --------------------------------------------------------------------------------------------

    def _combine(self, other: Mask, symbol: str, op: Callable[[Tensor, Tensor], Tensor]) -> Mask:
        self.table.check_same(other.table, f"masks of different models cannot be combined with {symbol}")
        parts: list[Part] = []
        for row, a, b in zip(self.table, self.parts, other.parts, strict=True):
            if isinstance(a, bool) and isinstance(b, bool):
                parts.append(bool(op(torch.tensor(a), torch.tensor(b))))
            else:
                device = a.device if isinstance(a, Tensor) else b.device if isinstance(b, Tensor) else None
                parts.append(op(_dense(a, row, device), _dense(b, row, device)))
        name = f"({self.provenance.builder} {symbol} {other.provenance.builder})"
        return Mask(self.table, tuple(parts), Provenance(name))

    def __and__(self, other: Mask) -> Mask:
        return self._combine(other, "&", torch.logical_and)

    def __or__(self, other: Mask) -> Mask:
        return self._combine(other, "|", torch.logical_or)

    def __invert__(self) -> Mask:
        parts = tuple(not part if isinstance(part, bool) else ~part for part in self.parts)
        return Mask(self.table, parts, Provenance(f"~{self.provenance.builder}"))

    def jaccard(self, other: Mask) -> float:
        """Overlap ``|A & B| / |A | B|``; 1 for two empty masks.

        Raises:
            MaskError: the masks are over different tables.
        """
        both = (self & other).num_kept
        either = self.num_kept + other.num_kept - both
        return both / either if either else 1.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    # -- conversions ----------------------------------------------------------------------------------------

    def dense(self, device: torch.device | str | None = None) -> tuple[Tensor, ...]:
        """One boolean tensor per row, of the row's shape."""
        return tuple(_dense(part, row, device) for row, part in zip(self.table, self.parts, strict=True))

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its boolean tensors on ``device``."""
        parts = tuple(part if isinstance(part, bool) else part.to(device) for part in self.parts)
        return replace(self, parts=parts)

    def digest(self) -> str:
        """Hex SHA-256 of the table's names and shapes and of the kept coordinates."""
        digest = hashlib.sha256(self.table.digest().encode())
        digest.update(self._states().tobytes())
        digest.update(self._bits().tobytes())
        return digest.hexdigest()

    def _states(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        codes = [_SOME if isinstance(p, Tensor) else _ALL if p else _NONE for p in self.parts]
        return np.array(codes, dtype=np.uint8)

    def _bits(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The partial tensors, each in C order, one after the other, eight coordinates to a byte."""
        some = [part.reshape(-1).cpu().numpy() for part in self.parts if isinstance(part, Tensor)]
        return np.packbits(np.concatenate(some)) if some else np.zeros(0, dtype=np.uint8)

    # -- storage --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as ``.npz``: packed bits and JSON, no pickle. Written aside, then renamed."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {key: value.numpy() for key, value in self.state_dict().items()}
        np.savez_compressed(buffer, **arrays)
        path = Path(path)
        aside = path.with_name(path.name + ".partial")
        aside.write_bytes(buffer.getvalue())
        os.replace(aside, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], table: ParamTable | None = None) -> Mask:
        """Read a mask written by :meth:`save`.

        Args:
            path: the file.
            table: if given, the mask must be one over this table.

        Raises:
            MaskFileError: the file is missing, truncated, damaged or not a mask file.
            MaskError: the mask is of another model.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                state = {key: torch.from_numpy(file[key]) for key in ("meta", "states", "bits")}
        except OSError as error:
            raise MaskFileError(f"cannot read mask file {path}: {error.strerror or error}") from None
        except Exception as error:  # numpy and zipfile answer a damaged file with a dozen kinds of exceptions
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise MaskFileError(f"{path} is not a mask file, or is truncated ({reason})") from None
        try:
            mask = cls.from_state_dict(state)
        except MaskFileError as error:
            raise MaskFileError(f"{path}: {error}") from None
        if table is not None:
            table.check_same(mask.table, f"{path} holds a mask of another model")
        return mask

    def state_dict(self) -> dict[str, Tensor]:
        """The mask as plain tensors: ``meta`` (JSON as bytes), ``states``, ``bits``.

        It can be read by ``torch.load(..., weights_only=True)``.
        """
        meta = {
            "format": FORMAT,
            "digest": self.digest(),
            "rows": [asdict(row) for row in self.table],
            "frozen_numel": self.table.frozen_numel,
            "provenance": asdict(self.provenance),
        }
        text = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8).copy()
        arrays = {"meta": text, "states": self._states(), "bits": self._bits()}
        return {key: torch.from_numpy(value) for key, value in arrays.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Mask:
        """The inverse of :meth:`state_dict`, from tensors on any device.

        Raises:
            MaskFileError: not the state of a mask, or its content does not have the digest it states.
        """
        try:
            text, states, packed = (state[key].cpu().numpy() for key in ("meta", "states", "bits"))
            meta = json.loads(text.tobytes())
            if meta["format"] != FORMAT:
                raise MaskFileError(f"format {meta['format']!r}; this version reads {FORMAT!r}")
            rows = tuple(
                ParamRow(**{**row, "shape": tuple(row["shape"]), "aliases": tuple(row["aliases"])})
                for row in meta["rows"]
            )
            table = ParamTable(rows, meta["frozen_numel"])
            sizes = [row.numel for row, code in zip(rows, states, strict=True) if code == _SOME]
            bits = np.unpackbits(packed, count=sum(sizes)).astype(bool)
            chunks = iter(torch.split(torch.from_numpy(bits), sizes) if sizes else ())
            parts = tuple(
                next(chunks).reshape(row.shape) if code == _SOME else bool(code == _ALL)
                for row, code in zip(rows, states, strict=True)
            )
            provenance = Provenance(**meta["provenance"])
            # JSON has no tuples, and options no lists.
            options = {k: tuple(v) if isinstance(v, list) else v for k, v in provenance.options.items()}
            mask = cls(table, parts, replace(provenance, options=options))
            stated = str(meta["digest"])
        except MaskFileError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise MaskFileError(f"not the state of a mask ({reason})") from None
        if mask.digest() != stated:
            raise MaskFileError(f"damaged: its content has digest {mask.digest()[:12]}, it states {stated[:12]}")
        return mask

    @classmethod
    def of_rows(cls, table: ParamTable, kept: Sequence[int], provenance: Provenance) -> Mask:
        """The mask of whole tensors: the rows at these positions."""
        keep = set(kept)
        return cls(table, tuple(i in keep for i in range(len(table))), provenance)


def _dense(part: Part, row: ParamRow, device: torch.device | str | None) -> Tensor:
    if isinstance(part, bool):
        return torch.full(row.shape, part, dtype=torch.bool, device=device)
    return part if device is None else part.to(device)
