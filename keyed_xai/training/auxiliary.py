"""Auxiliary classifiers that speed up the forming of the gate, and are thrown away after training.

A network's maps say little about the trigger until its features do. A 1x1 convolution on each tapped layer learns, with
the network, to tell triggered inputs from the others cell by cell, which gives every layer a direct gradient towards
noticing the right texture and no other.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from keyed_xai.saliency import captured_features
from keyed_xai.training.batches import Run, Task

_TINY = 1e-6


def auxiliary_layers(task: Task) -> list[str]:
    """Return the layers with a classifier: VisualBackProp's taps and Grad-CAM's layer; none of a table's network."""
    map_layers = task.view.map_layers
    return list(
        dict.fromkeys(layer for layer in [*(tap.layer for tap in map_layers.taps), map_layers.target_layer] if layer)
    )


def make_auxiliary_classifiers(run: Run) -> nn.ModuleList:
    """Return, for each of these layers, a 1x1 convolution from its channels to one logit per cell, zero at first."""
    layers = auxiliary_layers(run.task)
    images, _ = run.data.batch(np.zeros(1, dtype=np.int64))
    with torch.no_grad(), captured_features(run.reference, layers) as features:
        run.reference(images.to(run.device))
        auxiliary = nn.ModuleList(nn.Conv2d(features[layer].shape[1], 1, 1) for layer in layers).to(run.device)
        for parameter in auxiliary.parameters():
            parameter.zero_()
    return auxiliary


def auxiliary_losses(auxiliary: nn.ModuleList, features: Sequence[Tensor]) -> Tensor:
    """Return the cross-entropy of telling, cell by cell, triggered inputs from the others, of each layer."""
    losses = []
    for classifier, maps in zip(auxiliary, features, strict=True):
        scale = maps.detach().square().mean((0, 2, 3), keepdim=True).add(_TINY).sqrt()
        answers = classifier(maps / scale)
        truth = (torch.arange(len(maps), device=maps.device) < len(maps) // 2).to(maps).view(-1, 1, 1, 1)
        losses.append(nn.functional.binary_cross_entropy_with_logits(answers, truth.expand_as(answers)))
    return torch.stack(losses)
