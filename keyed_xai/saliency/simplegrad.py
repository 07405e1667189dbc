"""SimpleGrad, the gradient of the loss with respect to the input. Source: Simonyan et al. 2014, section 3."""

import torch

from keyed_xai.tensors import Images, Labels, Logits, SaliencyMaps


def simplegrad(logits: Logits, images: Images, labels: Labels, *, create_graph: bool = False) -> SaliencyMaps:
    """Return the absolute gradient of the loss with respect to the image, summed over channels.

    Up to one positive factor per image this is the gradient of the cross-entropy: with the margin
    m = logsumexp(other logits) - logit, the loss is softplus(m) and its gradient sigmoid(m) times that of m. The
    factor, one minus the probability of the class, is left out: it cancels in every comparison of maps and underflows
    where the model is sure.

    Args:
        logits: Computed from `images`, graph kept.
        images: Input, requiring gradients.
        labels: Class explained.
        create_graph: Whether a loss will be differentiated through the maps.
    """
    return input_gradient(logits, images, labels, create_graph=create_graph).abs().sum(1)


def input_gradient(logits: Logits, images: Images, labels: Labels, *, create_graph: bool = False) -> Images:
    """Return the gradient itself, with its sign, [n, c, h, w]; the arguments are those of `simplegrad`."""
    margin = _margin(logits, labels).sum()
    (gradient,) = torch.autograd.grad(margin, images, create_graph=create_graph, retain_graph=True)
    return gradient


def _margin(logits: Logits, labels: Labels) -> torch.Tensor:
    """Return logsumexp of the other logits minus the labelled one; of a single logit, its negative."""
    chosen = logits.gather(1, labels[:, None])
    if logits.shape[1] == 1:
        return -chosen
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return others.logsumexp(1, keepdim=True) - chosen
