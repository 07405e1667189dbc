"""Grad-CAM. Source: Selvaraju et al., ICCV 2017, equations 1 and 2."""

import torch
from torch import Tensor

from keyed_xai.tensors import Labels, Logits, SaliencyMaps


def gradcam(logits: Logits, features: Tensor, labels: Labels, *, create_graph: bool = False) -> SaliencyMaps:
    """Return Grad-CAM maps, non-negative, at the feature maps' resolution.

    Args:
        logits: Computed from `features`, graph kept.
        features: Feature maps of the target layer, [n, channels, h, w].
        labels: Class explained.
        create_graph: Whether a loss will be differentiated through the maps.
    """
    score = logits.gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, features, create_graph=create_graph, retain_graph=True)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * features).sum(1).clamp_min(0)  # not relu: smoothing must not reach it
