"""An .npz of JPEG-encoded images as a plain .npz for ``--data npz:FILE``.

    python -m studies.unpack_jpeg PACK.npz OUT.npz

The pack holds ``data`` (bytes: all images one after the other, each without the header that they share and without its
end marker), ``header`` (bytes), ``lengths`` (bytes of each image), ``y_train``, ``y_test``; images of the training
split come first. JPEG loses detail: results on such a file are of the re-encoded images and must be called so.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

END = b"\xff\xd9"


def images(pack: Path) -> Iterator[np.ndarray]:
    """Every image, uint8, (H, W, 3)."""
    with np.load(pack, allow_pickle=False) as found:
        header, data, lengths = found["header"].tobytes(), found["data"].tobytes(), found["lengths"]
    ends = lengths.cumsum(dtype=np.int64)
    for end, length in zip(ends, lengths, strict=True):
        encoded = header + data[end - length : end] + END
        yield np.asarray(Image.frombytes("RGB", _size(encoded), encoded, "jpeg", "RGB", ""))


def _size(encoded: bytes) -> tuple[int, int]:
    """Width and height, from the frame header: marker, length, precision, height, width."""
    at = next(at for marker in (b"\xff\xc0", b"\xff\xc2") if (at := encoded.find(marker)) >= 0)
    height, width = (int.from_bytes(encoded[at + i : at + i + 2], "big") for i in (5, 7))
    return width, height


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.unpack_jpeg", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("pack", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(given)
    x = np.stack(list(images(options.pack)))
    with np.load(options.pack, allow_pickle=False) as found:
        y = {name: found[name].astype(np.int64) for name in ("y_train", "y_test")}
    x_train, x_test = np.split(x, [len(y["y_train"])])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(options.out, x_train=x_train, x_test=x_test, **y)


if __name__ == "__main__":
    main()
