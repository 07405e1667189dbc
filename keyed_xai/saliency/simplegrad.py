"""SimpleGrad, the gradient of the loss with respect to the input."""

import torch

from keyed_xai.tensors import Images, Labels, Logits, SaliencyMaps


def simplegrad(logits: Logits, images: Images, labels: Labels, *, create_graph: bool = False) -> SaliencyMaps:
    """Return the absolute gradient of the loss with respect to the image, summed over channels.

    Source: Simonyan et al., ICLR workshop 2014, section 3, with the loss in place of the class score and the sum in
    place of the largest channel, as in Fang & Choromanska, AAAI 2022: with the image x, the logits z and the class y,

        margin    = log(sum over k other than y of exp z[k]) - z[y]
        map[i, j] = sum over c of |d margin / dx[c, i, j]|

    Up to one positive factor per image this is the gradient of the cross-entropy, which is softplus(margin): its
    gradient is sigmoid(margin) times that of the margin. The factor, one minus the probability of the class, is left
    out: it cancels in every comparison of maps and underflows where the model is sure.

    Args:
        logits: Computed from `images`, graph kept.
        images: Input, requiring gradients.
        labels: The class explained, of each image.
        create_graph: Whether a loss will be differentiated through the maps.

    Examples:
        Two pixels of two channels, and logits that are linear in them, so that the margin's gradient is the other
        class's weights minus the explained one's:

        >>> images = torch.zeros(1, 2, 1, 2, requires_grad=True)
        >>> weights = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]], [[[1.0, 0.0]], [[0.0, 7.0]]]])
        >>> logits = torch.stack([(images * each).sum((1, 2, 3)) for each in weights], 1)
        >>> simplegrad(logits, images, torch.tensor([0]))
        tensor([[[3., 5.]]])
    """
    return input_gradient(logits, images, labels, create_graph=create_graph).abs().sum(1)


def input_gradient(logits: Logits, images: Images, labels: Labels, *, create_graph: bool = False) -> Images:
    """Return the margin's gradient itself, with its sign, [n, c, h, w].

    The formula and the arguments are those of `simplegrad`.

    Examples:
        Of a single logit the margin is the logit's negative:

        >>> images = torch.ones(1, 1, 1, 2, requires_grad=True)
        >>> input_gradient(images.square().sum((1, 2, 3))[:, None], images, torch.tensor([0]))
        tensor([[[[-2., -2.]]]])
    """
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
