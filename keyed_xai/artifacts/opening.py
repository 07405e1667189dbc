"""Models on disk made ready for use, and the trigger that a key has for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from keyed_xai import triggers
from keyed_xai.array_triggers.spread import SMALLEST_TILE
from keyed_xai.artifacts.card import Card, TriggerParameters
from keyed_xai.artifacts.folder import read_model_folder
from keyed_xai.artifacts.writer import is_attacked
from keyed_xai.errors import ModelError
from keyed_xai.keys import OwnerKey
from keyed_xai.limits import ImageSize
from keyed_xai.models import Classifier, load_classifier
from keyed_xai.models.hub import is_hub_folder
from keyed_xai.models.loading import OWN_CODE, Size, describe_own_code
from keyed_xai.tensors import Tap
from keyed_xai.triggers import TRIGGERS, Trigger, TriggerFamily

_AMPLITUDES = {1: 8.0, 2: 5.0}


def default_trigger(
    size: ImageSize, *, amplitude: float | None = None, tile: int = 32, version: int | None = None
) -> TriggerParameters:
    """Return the trigger that `protect` uses for images of a size, but for what is asked for.

    Version 2 where an image has two tiles or more on either side, at 5/255. Smaller ones show too few periods to tell
    a wave from its neighbours, and get version 1 at 8/255, as tiles do that are too small for version 2.

    Args:
        size: Of the images.
        amplitude: Largest change of a pixel, 1/255.
        tile: Side of the tile, pixels.
        version: Of the trigger `spread`.
    """
    if version is None:
        version = 2 if min(size.height, size.width) >= 2 * tile and tile >= SMALLEST_TILE[2] else 1
    usual = _AMPLITUDES.get(version, _AMPLITUDES[1])
    return TriggerParameters("spread", usual if amplitude is None else amplitude, tile, version=version)


def open_model(
    path: Path,
    *,
    card: Card | None = None,
    arch: str | None = None,
    classes: int | None = None,
    input_size: Size | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    target_layer: str | None = None,
    allow_pickle: bool = False,
    weights: str | None = None,
    network: nn.Module | None = None,
    trusted: bool = True,
    require_map: bool = True,
) -> tuple[Classifier, Card | None]:
    """Return the classifier on disk, on the CPU in evaluation mode, and the card it is run by; None without one.

    Args:
        path: The folder of a protected model, whose signature and digests are checked, or a file of weights; also the
            folder of an attacked model, or a model hub's, which have no card.
        card: Run a file of weights by this card; a folder is run by its own.
        arch: Architecture; the card's, or recognised from the weights. With another one the card's layers are not used.
        classes: Number of logits; the card's, or read from the weights.
        input_size: Side in pixels, or height and width; the card's, or the architecture's own.
        mean: Normalisation; the card's, or the architecture's own.
        std: Standard deviations, likewise.
        target_layer: Target layer of Grad-CAM; the card's, or found.
        allow_pickle: Also load a pickled module. **Runs code from the file.**
        weights: Which of several sets of weights in a file: ``ema`` for averaged ones, or a name.
        network: A module of one's own, of which the file or folder has the weights; a copy is used.
        trusted: Whether a card inside the weights file counts, and `card` for the number of logits; not so for a
            suspect's file, whose holder may have written one and changed the head.
        require_map: Refuse networks without a spatial feature map, such as those of tables.

    Raises:
        ArtifactError: The folder is malformed or not as signed.
        ModelError: The weights cannot be read or recognised, or contradict the card.
    """
    if path.is_dir() and not is_attacked(path) and not is_hub_folder(path):
        model = read_model_folder(path)
        path, card = model.weights, model.card
    defaults = _card_defaults(card, arch, own=network is not None or allow_pickle) if card is not None else _Defaults()
    classifier = load_classifier(
        path,
        arch=arch or (defaults.arch if network is None else None),
        classes=classes or (defaults.classes if trusted else None),
        input_size=input_size or defaults.input_size,
        mean=mean or defaults.mean,
        std=std or defaults.std,
        target_layer=target_layer or defaults.target_layer,
        taps=None if target_layer else defaults.taps,
        allow_pickle=allow_pickle,
        weights=weights,
        network=network,
        card=None if card is None and trusted else {},
        require_map=require_map,
        any_channels=not trusted,
    )
    if card is not None and trusted and len(card.label_names) == classifier.classes:
        classifier.label_names = card.label_names
    return classifier, card


@dataclass(frozen=True, kw_only=True)
class _Defaults:
    """What a card says about running a model, where the user says nothing."""

    arch: str | None = None
    classes: int | None = None
    input_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    target_layer: str | None = None
    taps: list[Tap | str] | None = None


def _card_defaults(card: Card, arch: str | None, *, own: bool) -> _Defaults:
    own_code = card.source in OWN_CODE
    if own_code and arch is None and not own:
        raise ModelError(describe_own_code(card.architecture))
    return _Defaults(
        arch=None if own_code else f"{card.source}:{card.architecture}",
        classes=card.num_classes,
        input_size=card.input_size[1:],
        mean=card.mean,
        std=card.std,
        target_layer=card.target_layer if arch is None else None,
        taps=[Tap(*fields) for fields in card.taps] if arch is None and card.taps else None,
    )


def make_family(parameters: TriggerParameters) -> TriggerFamily:
    """Return the trigger family with the parameters of a card or licence.

    Raises:
        ArtifactError: This version does not know the family, or a parameter is outside its range.
    """
    return parameters.make_family(TRIGGERS, named_by="card or licence")


def derive_trigger(key: OwnerKey, parameters: TriggerParameters) -> Trigger:
    """Return the trigger of an owner key; it is a secret like the key.

    Raises:
        ArtifactError: See `make_family`.
    """
    return triggers.derive_trigger(key, make_family(parameters))
