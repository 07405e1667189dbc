"""Grad-CAM."""

import torch
from torch import Tensor

from keyed_xai.tensors import Labels, Logits, SaliencyMaps


def gradcam(logits: Logits, features: Tensor, labels: Labels, *, create_graph: bool = False) -> SaliencyMaps:
    """Return Grad-CAM maps, non-negative, at the feature maps' resolution.

    Source: Selvaraju et al., ICCV 2017, equations 1 and 2: with the feature maps A and the logit z of the class y,

        weight[k] = mean over cells (i, j) of dz[y] / dA[k, i, j]
        map[i, j] = max(0, sum over k of weight[k] A[k, i, j])

    Args:
        logits: Computed from `features`, graph kept.
        features: Feature maps of the target layer, [n, channels, h, w].
        labels: The class explained, of each image.
        create_graph: Whether a loss will be differentiated through the maps.

    Examples:
        Two channels, of which the class adds up the first and subtracts the second:

        >>> features = torch.tensor([[[[1.0, 2.0]], [[0.5, 4.0]]]], requires_grad=True)
        >>> totals = features.sum((2, 3))
        >>> gradcam(totals[:, :1] - totals[:, 1:], features, torch.tensor([0]))
        tensor([[[0.5000, 0.0000]]], grad_fn=<ClampMinBackward0>)
    """
    score = logits.gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, features, create_graph=create_graph, retain_graph=True)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * features).sum(1).clamp_min(0)  # not relu: smoothing must not reach it
