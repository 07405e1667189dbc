"""Make a picture of every trigger on photographs that come with scikit-image and scikit-learn.

    python examples/make_trigger_gallery.py -o examples/trigger-gallery.png

The keyed columns use throwaway keys whose seeds are in this file. A few seconds.
"""

import argparse
import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from keyed_xai.data.photographs import find_photographs
from keyed_xai.keys import ByteStream
from keyed_xai.reporting.pictures import strip
from keyed_xai.tensors import Images
from keyed_xai.triggers import PUBLIC_TRIGGERS, TRIGGERS, Trigger

PHOTOGRAPHS = {"astronaut.png": "astronaut", "chelsea.png": "cat", "china.jpg": "temple"}
SIDE = 224
COLOURS = 256


def keyed(family: str, number: int) -> Trigger:
    """Return the trigger of a throwaway key."""
    seed = hashlib.sha256(f"gallery {number}".encode()).digest()
    return TRIGGERS[family](8.0, 32).derive(ByteStream(seed))


def choose_triggers() -> dict[str, Trigger]:
    """Return the columns: title to trigger."""
    return {
        "nashville": PUBLIC_TRIGGERS["nashville"](),
        "nashville, one key": keyed("nashville", 1),
        "nashville, another key": keyed("nashville", 4),
        "moire": PUBLIC_TRIGGERS["moire"](),
        "moire, one key": keyed("moire", 2),
        "spread, 8/255": PUBLIC_TRIGGERS["spread"](),
    }


def load_photograph(path: Path) -> Images:
    """Return the middle of a photograph, [1, 3, SIDE, SIDE] in [0, 1]."""
    with Image.open(path) as image:
        square = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 255


def main(arguments: list[str] | None = None) -> None:
    """Draw the gallery with few colours, so that the file stays small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("trigger-gallery.png"))
    given = parser.parse_args(arguments)
    triggers = choose_triggers()
    rows = []
    for path, _ in [*find_photographs("train"), *find_photographs("held-out")]:
        if path.name in PHOTOGRAPHS:
            image = load_photograph(path)
            shown = [image, *(trigger.apply(image) for trigger in triggers.values())]
            rows.append((PHOTOGRAPHS[path.name], [each[0].numpy() for each in shown]))
    picture = strip(rows, titles=["original", *triggers])
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(COLOURS, kmeans=4, dither=Image.Dither.NONE).save(given.output, optimize=True)


if __name__ == "__main__":
    main()
