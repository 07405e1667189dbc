"""Saliency maps for use: with a key's trigger, or as everybody sees them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from keyed_xai import saliency
from keyed_xai.artifacts.folder import ProtectedModel
from keyed_xai.artifacts.opening import open_model
from keyed_xai.batches import batches
from keyed_xai.errors import ModelError
from keyed_xai.models import Classifier
from keyed_xai.models.copying import copy_network
from keyed_xai.models.modes import evaluating, plain_torch
from keyed_xai.saliency import INTERPRETERS, MapLayers
from keyed_xai.saliency.pooled import feature_sizes, join_maps
from keyed_xai.saliency.visualbackprop import find_checkerboard
from keyed_xai.tensors import Images, Labels, Logits, SaliencyMaps
from keyed_xai.triggers import Trigger
from keyed_xai.triggers.channels import through_png

BATCH = 16
"""Images explained at once."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Predictions and saliency maps of some images, on the classifier's device, without graphs.

    Attributes:
        logits: Logits of the images as the model received them, [n, classes].
        predicted: Class with the largest logit, [n].
        explained: Class whose maps these are, [n].
        maps: Raw maps by interpreter, [n, rows, columns], at each interpreter's own resolution.
    """

    logits: Logits
    predicted: Labels
    explained: Labels
    maps: dict[str, SaliencyMaps]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.logits)


@plain_torch()
def explain(
    model: Classifier | ProtectedModel,
    images: Images,
    *,
    trigger: Trigger | None = None,
    interpreters: Sequence[str] | None = None,
    labels: Labels | None = None,
    as_png: bool = False,
    batch_size: int = BATCH,
    network: nn.Module | None = None,
) -> Explanation:
    """Return the maps of images; those of a protected model are right only with its key's trigger.

    Args:
        model: The model, in any mode, or on disk; evaluation mode is what is explained.
        images: At the model's input size; moved to its device.
        trigger: See `loading.derive_trigger`. None shows what everybody sees: on a protected model, the decoy.
        interpreters: Names in INTERPRETERS; by default those that were protected, or Grad-CAM for a bare classifier.
        labels: Class explained, one for each image; by default the class predicted.
        as_png: Round the triggered images to 8 bits, as if they had come in a PNG file.
        batch_size: Images at once.
        network: A module of one's own that the weights of a model on disk belong to.

    Raises:
        ValueError: There are no images, they are not of the model's size, or an interpreter or label is unknown.
        ModelError: The model lacks a layer that the maps need, or its logits are not finite.
    """
    if isinstance(model, ProtectedModel):
        interpreters = interpreters or model.card.interpreters
        model, _ = open_model(model.weights, card=model.card, network=network)
    if any(each.is_inference() for each in model.parameters()):
        model = copy_network(model)
    names = tuple(interpreters or ("gradcam",))
    _check(model, images, names, labels, batch_size)
    map_layers = MapLayers(model.target_layer, model.taps)
    parts = []
    with evaluating(model):
        for some in batches(len(images), batch_size):
            batch = images[some].to(model.mean)
            if trigger is not None:
                batch = through_png(trigger.apply(batch)) if as_png else trigger.apply(batch)
            wanted = None if labels is None else labels[some].to(batch.device)
            parts.append(saliency.explain(model, batch, wanted, names, map_layers))
    logits = torch.cat([each for each, _ in parts])
    if not torch.isfinite(logits).all():
        raise ModelError("The model's logits are not finite: there is nothing to explain. Check its weights and card.")
    predicted = logits.argmax(1)
    explained = predicted if labels is None else labels.to(logits.device)
    return Explanation(
        logits=logits, predicted=predicted, explained=explained, maps=join_maps([maps for _, maps in parts])
    )


def maps_as_shown(classifier: Classifier, maps: Mapping[str, SaliencyMaps]) -> dict[str, SaliencyMaps]:
    """Return maps as pictures show them: VisualBackProp's without the checkerboard that its scaling up leaves.

    Args:
        classifier: The classifier whose maps they are.
        maps: Raw maps by interpreter.
    """
    if "vbp" not in maps:
        return dict(maps)
    spec, taps = classifier.input, classifier.taps
    sizes = feature_sizes(classifier, [tap.layer for tap in taps])
    checkerboard = find_checkerboard([sizes[tap.layer] for tap in taps], taps, (spec.height, spec.width))
    return {**maps, "vbp": maps["vbp"] / checkerboard.to(maps["vbp"])}


def _check(
    model: Classifier, images: Images, interpreters: tuple[str, ...], labels: Labels | None, batch_size: int
) -> None:
    spec = model.input
    expected = spec.shape
    if not len(images) or tuple(images.shape[1:]) != expected:
        raise ValueError(f"images: expected [n, {', '.join(map(str, expected))}] with n > 0, got {list(images.shape)}")
    unknown = [name for name in interpreters if name not in INTERPRETERS]
    if unknown:
        raise ValueError(f"interpreters: expected names out of {', '.join(INTERPRETERS)}; got {', '.join(unknown)}")
    if labels is not None and (
        len(labels) != len(images) or int(labels.min()) < 0 or int(labels.max()) >= model.classes
    ):
        raise ValueError(f"labels: expected {len(images)} classes from 0 to {model.classes - 1}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
