"""A classifier as the rest of the package sees it: pixels in [0, 1] in, logits out, normalisation inside."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn import functional

from keyed_xai.limits import ImageSize, describe_excess
from keyed_xai.tensors import Images, Logits, Tap

_NAMES = ("logits", "outputs", "output", "out", "predictions", "preds", "pred", "scores", "y_hat", "y")
_FAINTEST = 1e-6  # of a probability: the nearest that float32 tells from 1 is 6e-8


@dataclass(frozen=True, kw_only=True)
class InputSpec(ImageSize):
    """The images that a network takes.

    Attributes:
        channels: 1 for grey, 3 for RGB; any other number for user modules.
        height: Height in pixels.
        width: Width in pixels.
        mean: Subtracted from pixels in [0, 1], one per channel.
        std: Divides what is left, one per channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A size beyond `keyed_xai.limits`, or mean and std that are not one finite number per channel
                (std > 0).
        """
        excess = describe_excess(*self.shape)
        if excess is not None:
            raise ValueError(excess)
        for name, values in {"mean": self.mean, "std": self.std}.items():
            if len(values) != self.channels or not all(map(isfinite, values)):
                raise ValueError(f"{name} must hold {self.channels} finite numbers, one per channel, but came {values}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, but came {self.std}")


class Classifier(nn.Module):
    """Pixels in [0, 1] to logits, normalisation inside (mean and std are non-persistent buffers).

    Attributes:
        network: The user's network, taking normalised images.
        input: Size and normalisation.
        architecture: Its name where it came from, such as ``resnet50``.
        source: ``torchvision``, ``timm``, ``efficientnet_lite_pytorch``, ``keyed_xai``, ``pickle`` or ``python``.
        classes: Number of logits.
        target_layer: Dotted name inside this module, so it starts with ``network.``; empty if there is no feature map.
        taps: What VisualBackProp reads, from the first layer to the last; names as in ``target_layer``.
        file_names: Tensor names inside the network to names in the file it came from, in the file's order.
        label_names: Names of the classes; empty where they are not known.
        multi_label: Whether every logit is a yes or no of its own.
        probability: Whether the network's single output is a probability: it ends in a sigmoid.
        notes: Sentences about how the file was read: the prefix taken off, what was left out, which weights were taken.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        input: InputSpec,  # noqa: A002 - the card's name for it
        architecture: str,
        source: str,
        classes: int,
        target_layer: str,
        taps: tuple[Tap, ...],
        file_names: Mapping[str, str] | None = None,
        label_names: tuple[str, ...] = (),
        multi_label: bool = False,
        probability: bool = False,
    ) -> None:
        """Wrap a network; `wrap_network` finds the layers and checks the sizes first."""
        super().__init__()
        self.network = network
        self.input = input
        self.architecture = architecture
        self.source = source
        self.classes = classes
        self.target_layer = target_layer
        self.taps = taps
        self.file_names = dict(file_names) if file_names is not None else None
        self.label_names = label_names
        self.multi_label = multi_label
        self.probability = probability
        self.notes: tuple[str, ...] = ()
        like = next(network.parameters(), torch.zeros(()))
        for name in ("mean", "std"):
            values = torch.tensor(getattr(input, name), dtype=like.dtype, device=like.device)
            self.register_buffer(name, values[:, None, None], persistent=False)

    def forward(self, images: Images) -> Logits:
        """Return the logits; gradients flow. Auxiliary outputs (Inception in training mode) are left out.

        Of a network with a single output, yes or no, they are 0 and that output.
        """
        logits = logits_of(self.network((images - self.mean) / self.std))
        logits = as_classes(logits, probability=self.probability)
        return logits if logits.dtype == images.dtype else logits.to(images.dtype)  # autocast in the network's forward


def logits_of(output: object) -> Tensor:
    """Return the logits in what a network returned.

    A tensor; something with ``.logits`` (torchvision's auxiliary outputs, transformers' outputs); a dictionary or a
    dataclass with one tensor, or one of the names in `_NAMES`; or a tuple or list, of which the first entry counts.

    Raises:
        TypeError: There is no tensor to be found.
    """
    found = getattr(output, "logits", output)
    if is_dataclass(found) and not isinstance(found, type):
        found = {field.name: getattr(found, field.name) for field in fields(found)}
    if isinstance(found, Mapping):
        found = _named_logits(found)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        what = f"a dict of {', '.join(map(repr, output)) or 'nothing'}" if isinstance(output, Mapping) else "no tensor"
        raise TypeError(
            f"a classifier must return a tensor of logits, alone or named {', '.join(_NAMES[:3])} and the like, but "
            f"this one returned {type(output).__name__}: {what}"
        )
    return found


def _named_logits(outputs: Mapping[object, object]) -> object:
    """Return the entry of a dictionary that is called logits or the like, or else its only tensor."""
    named = [outputs[name] for name in _NAMES if isinstance(outputs.get(name), Tensor)]
    tensors = named or [value for value in outputs.values() if isinstance(value, Tensor)]
    return tensors[0] if named or len(tensors) == 1 else outputs


def as_classes(logits: Tensor, *, probability: bool = False) -> Tensor:
    """Return logits [n, classes]; a single one, z, that says yes or no, becomes the two logits 0 and z.

    Args:
        logits: [n, classes], or [n] or [n, 1] of a single one.
        probability: Whether the single one has been through a sigmoid, which is undone.
    """
    if logits.dim() > 2 or logits.shape[1:] not in ((), (1,)):
        return logits
    single = logits.reshape(-1, 1)
    if probability:
        single = single.clamp(_FAINTEST, 1 - _FAINTEST)
        single = single.log() - (1 - single).log()
    return functional.pad(single, (1, 0))


def network_state(classifier: Classifier) -> dict[str, Tensor]:
    """Return the network's tensors under the names, and in the order, of the file it was loaded from.

    A wrapper's prefix (``module.``) is kept, and so are the older names that torchvision used in its DenseNet and ViT
    files, so that the owner's own code loads the result unchanged. Half precision comes back as float32.
    """
    state: dict[str, Tensor] = classifier.network.state_dict()
    if classifier.file_names is None:
        return dict(state)
    return {file_name: state[name] for name, file_name in classifier.file_names.items()}
