"""Train the small Fashion-MNIST network that comes with the package, from the full training set.

    python examples/train_demo_network.py --data fashion-mnist:/usr/share/datasets/fashion-mnist -o network.safetensors

About 8 minutes on one core; 60,000 images, 7 epochs, with noise, so that its input gradients are stable.
"""

import argparse
import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from keyed_xai import wrap_network
from keyed_xai.data import ImageData, load_images
from keyed_xai.models import InputSpec
from keyed_xai.models.networks import SmallResNet
from keyed_xai.reporting.bars import progress_bar
from keyed_xai.training.fitting import FittingSettings, fit_classifier, measure_accuracy

SPEC = InputSpec(channels=1, height=32, width=32, mean=(0.3,), std=(0.35,))
CARD = {
    "architecture": "SmallResNet",
    "source": "keyed_xai",
    "num_classes": 10,
    "input_size": list(SPEC.shape),
    "mean": SPEC.mean,
    "std": SPEC.std,
}


def load(spec: str, split: Literal["train", "held-out"], limit: int | None) -> ImageData:
    """Return the images of a split."""
    return load_images(spec, SPEC, split=split, limit=limit)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure on the test set, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="SPEC of the images")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--limit", type=int, help="train on at most so many images")
    parser.add_argument("-o", "--output", type=Path, default=Path("fashion-mnist.safetensors"))
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    network = SmallResNet()
    classifier = wrap_network(network, input=SPEC)
    settings = FittingSettings(epochs=given.epochs)
    with progress_bar() as progress:
        fit_classifier(classifier, load(given.data, "train", given.limit), settings, progress=progress)
    print(f"test accuracy {measure_accuracy(classifier, load(given.data, 'held-out', given.limit)):.4f}")  # noqa: T201
    save_file(network.state_dict(), given.output, metadata={"keyed_xai_card": json.dumps(CARD)})


if __name__ == "__main__":
    main()
