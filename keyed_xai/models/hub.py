"""What a model hub's folder says beside the weights: the ``config.json`` of timm, or of Hugging Face's Trainer."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from keyed_xai.errors import ModelError
from keyed_xai.models import catalogue

CONFIG_FILE = "config.json"
_LARGEST = 4 * 1024 * 1024  # bytes; a thousand names of classes are some 30,000


def is_hub_folder(path: Path) -> bool:
    """Return whether a folder is one of a model hub: a configuration beside the weights."""
    return (path / CONFIG_FILE).is_file() and not (path / "card.json").exists()


def read_hub_config(folder: Path) -> tuple[dict[str, object], tuple[str, ...]]:
    """Return what a hub's folder says as a card's fields, not checked, and architecture names as hints.

    timm's own networks are named as the card's architecture where timm is installed, and are hints otherwise.

    Raises:
        ModelError: The file is too large or no JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}, ()
    config = _parse(path)
    pretrained = config.get("pretrained_cfg")
    images = pretrained if isinstance(pretrained, Mapping) else config
    card = {name: images[name] for name in ("input_size", "mean", "std") if images.get(name) is not None}
    labels = _labels(config, images)
    if labels:
        card["label_names"] = labels
    named = config.get("architecture")
    if not isinstance(named, str):
        return card, ()
    if catalogue.installed("timm") and catalogue.knows("timm", named):
        card |= {"architecture": named, "source": "timm"}
    return card, (named.partition(".")[0],)


def _parse(path: Path) -> Mapping[str, object]:
    if os.stat(path).st_size > _LARGEST:
        raise ModelError(f"{path.name} beside the weights is over {_LARGEST} bytes: no configuration is. Remove it.")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(
            f"{path.name} beside the weights is not JSON: {error}. Fetch it again or remove it."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path.name} beside the weights must be a JSON object, but is a {type(config).__name__}.")
    return config


def _labels(config: Mapping[str, object], images: Mapping[str, object]) -> list[str]:
    """Return names of classes: timm's list, or the values of Hugging Face's ``id2label`` in the order of their keys."""
    listed = config.get("label_names") or images.get("label_names")
    if isinstance(listed, list):
        return [str(name) for name in listed if isinstance(name, str)]
    numbered = config.get("id2label")
    if isinstance(numbered, dict) and all(key.isdecimal() and len(key) < 7 for key in numbered):
        return [str(numbered[key]) for key in sorted(numbered, key=int) if isinstance(numbered[key], str)]
    return []
