"""Make the subset of Fashion-MNIST that comes with the package: 10,000 + 1,000 images, always the same.

    python examples/make_builtin_data.py FOLDER keyed_xai/data/fashion_mnist_subset.npz

FOLDER holds the four files of Fashion-MNIST. An image is chosen by a hash of its number, as many of each class, from
the data set's own training and test splits. The pixels are stored as they are; with the same zlib the file comes out
the same to the byte.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np

from keyed_xai.data import ImageSize
from keyed_xai.data.fashion_mnist import read_split
from keyed_xai.data.images import Request, Split, order_balanced

COUNTS: dict[Split, int] = {"train": 10_000, "held-out": 1000}


def main(arguments: list[str] | None = None) -> None:
    """Read the data set and write the subset."""
    parser = argparse.ArgumentParser(description="Make the built-in subset of Fashion-MNIST.")
    parser.add_argument("folder", type=Path, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("output", type=Path, help="the .npz file to write")
    options = parser.parse_args(arguments)
    arrays: dict[str, np.ndarray] = {}
    for split, count in COUNTS.items():
        images, labels = read_split(options.folder, split)
        request = Request(size=ImageSize(1, 28, 28), split=split, limit=count)
        chosen = np.array(order_balanced([str(index) for index in range(len(labels))], labels.tolist(), request))
        prefix = split.replace("-", "_")
        arrays[f"{prefix}_images"] = images[chosen]
        arrays[f"{prefix}_labels"] = labels[chosen].astype(np.uint8)
        arrays[f"{prefix}_indices"] = chosen.astype(np.uint16)
    options.output.write_bytes(pack(arrays))


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Return a compressed .npz; unlike NumPy's own, at the highest level and free of dates."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.save(data, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return packed.getvalue()


if __name__ == "__main__":
    main()
