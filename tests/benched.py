"""What the benchmarks of the paper's tables run on: a folder of pictures, and a reference model."""

from PIL import Image

from keyed_xai.artifacts.weights import encode_weights
from tests.backdoors.test_attacking import make_classifier, make_images


def write_pictures(folder):
    """Return the folder, with three classes of 24 images in it."""
    data = make_images(72, 0)
    for number, (pixels, label) in enumerate(zip(data.images[:, 0], data.labels, strict=True)):
        (folder / data.classes[label]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / data.classes[label] / f"{number}.png")
    return folder


def write_reference(path):
    """Return the file, with the weights of `make_classifier` in it."""
    path.write_bytes(encode_weights(make_classifier()))
    return path


def times(folder):
    """Return when each file in the folder's own folders was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.parent != folder}
