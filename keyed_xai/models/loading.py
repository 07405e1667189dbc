"""From a model file, or a user's own module, to a `Classifier` whose layers are known.

What a file's weights do not say is taken from the flags, else from the card, else from the architecture's published
defaults (no download), else from ImageNet's; grey and other images get mean and std .5.
"""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from keyed_xai.errors import ModelError
from keyed_xai.models.catalogue import build_network, build_without_memory, default_input, plain_input, shapes_of
from keyed_xai.models.classifier import Classifier, InputSpec
from keyed_xai.models.copying import copy_network
from keyed_xai.models.files import ModelFile, read_model_file
from keyed_xai.models.layers import Trace, derive_taps, find_target_layer, trace_network
from keyed_xai.models.naming import Reading, list_readings
from keyed_xai.models.networks import TableMLP
from keyed_xai.models.recognise import Recognised, describe_reading, recognise_architecture
from keyed_xai.tensors import Tap

Size = int | tuple[int, int]
"""Side, or height and width, in pixels."""
OWN_CODE = frozenset({"pickle", "python"})
"""Sources of networks that are modules of somebody's own, which weights alone do not rebuild."""
_MOST_TAPS = 1024
_LARGEST_NUMBER = 1e6  # of a card's mean and std


class ModelChoices(TypedDict, total=False):
    """What a user says about a model file; keyword arguments of `load_classifier` and of `loading.open_model`."""

    arch: str | None
    classes: int | None
    input_size: Size | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    target_layer: str | None
    allow_pickle: bool
    weights: str | None
    network: nn.Module | None


class _Flags(NamedTuple):
    """What the user says about the images."""

    input_size: Size | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    any_channels: bool


def load_classifier(
    path: str | Path,
    *,
    arch: str | None = None,
    classes: int | None = None,
    input_size: Size | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    target_layer: str | None = None,
    taps: Sequence[Tap | str] | None = None,
    allow_pickle: bool = False,
    weights: str | None = None,
    network: nn.Module | None = None,
    card: Mapping[str, object] | None = None,
    require_map: bool = True,
    any_channels: bool = False,
) -> Classifier:
    """Return the classifier in a model file, on the CPU, in evaluation mode, in float32.

    Every argument but the first overrides the card, which overrides the architecture's defaults.

    Args:
        path: A state dict, a checkpoint, a safetensors file, or a folder with one; see `files.read_model_file`.
        arch: Architecture; recognised from the weights if not given. ``timm:NAME`` asks for timm's.
        classes: Number of logits; must agree with the weights.
        input_size: Side of the images, in pixels.
        mean: Per channel, for pixels in [0, 1].
        std: Per channel, for pixels in [0, 1].
        target_layer: Target layer of Grad-CAM, inside the user's network or (``network.``...) inside the classifier.
        taps: Layers of VisualBackProp; names alone have their kernels and strides derived.
        allow_pickle: Also load a pickled module. **Runs code from the file.**
        weights: Which of several sets of weights, or networks, in the file: ``ema`` for averaged ones, or a name or
            prefix. By default plain ones; the classifier's `notes` say what else there is.
        network: A module of one's own, of which the file has the weights; a copy is used. In place of `arch`.
        card: The card beside the file, already read; the one inside the file if not given.
        require_map: Refuse networks without a spatial feature map; otherwise target layer and taps stay empty.
        any_channels: Whether the weights may take grey images where `mean` and `std` are of colour ones, or the other
            way round: averages then count for grey, and grey's for every colour.

    Raises:
        ModelError: The file cannot be read, is not recognised, or contradicts the card or the arguments.
    """
    found = read_model_file(path, allow_pickle=allow_pickle, weights=weights)
    card = found.card or {} if card is None else card
    flags = _Flags(input_size, mean, std, any_channels)
    notes = found.notes
    if network is not None:
        network, file_names, done = _fill(network, found, arch)
        notes += done
        source, architecture = "python", _own_name(card) or type(network).__name__
        channels = _first_channels(network) or _card_channels(card) or 3
        spec = _choose_input(plain_input(channels), card, flags)
    elif found.module is not None:
        network, source, architecture = copy_network(found.module), "pickle", type(found.module).__name__
        channels = _first_channels(network) or _card_channels(card) or 3
        spec = _choose_input(plain_input(channels), card, flags)
        file_names = {name: name for name in network.state_dict()}
    else:
        named = arch or _own_architecture(card)
        known = recognise_architecture(
            found.tensors, arch=named, hints=found.hints, weights=None if found.chosen else weights
        )
        source, architecture = known.source, known.architecture
        notes += known.notes
        file_names = {name: file_name for file_name, name in known.names.items()}
        state = {name: found.tensors[file_name] for name, file_name in file_names.items()}
        spec = _choose_input(_default_input(known, state), card, flags)
        network = rebuild(known, state, spec)
    expected = classes if classes is not None else _whole(card, "num_classes")
    card_taps = _card_taps(card) if target_layer is None else None
    classifier = wrap_network(
        network.eval(),
        input=spec,
        classes=expected,
        architecture=architecture,
        source=source,
        target_layer=target_layer if target_layer is not None else _text(card, "target_layer"),
        taps=taps if taps is not None else card_taps,
        file_names=file_names,
        label_names=_names(card),
        multi_label=card.get("multi_label") is True,
        require_map=require_map,
    )
    classifier.notes = notes
    return classifier.eval()


def wrap_network(
    network: nn.Module,
    *,
    input: InputSpec,  # noqa: A002 - the card's name for it
    classes: int | None = None,
    architecture: str | None = None,
    source: str = "python",
    target_layer: str | None = None,
    taps: Sequence[Tap | str] | None = None,
    file_names: Mapping[str, str] | None = None,
    label_names: Sequence[str] = (),
    multi_label: bool = False,
    require_map: bool = True,
) -> Classifier:
    """Return a user's own network as a classifier; the network itself is used, not a copy, and left as it is.

    Args:
        network: Takes normalised images [n, c, h, w], returns logits [n, classes].
        input: The images it takes.
        classes: Number of logits, checked against what the network returns.
        architecture: A name for reports; the class name if not given.
        source: Name of the source that the network came from.
        target_layer: Target layer of Grad-CAM; found if not given.
        taps: Taps of VisualBackProp; derived if not given.
        file_names: Tensor names to names in the file, for `network_state`.
        label_names: Names of the classes; those of another number are left out.
        multi_label: Whether every logit is a yes or no of its own.
        require_map: Refuse networks without a spatial feature map; otherwise target layer and taps stay empty.

    Raises:
        ModelError: The network does not take such images, has no feature map, or a layer named is not there.
    """
    trace = trace_network(network, input)
    found = trace.logits.shape[1]
    if classes is not None and classes != found:
        raise ModelError(
            f"the model has {found} classes, but {classes} were asked for. Leave the number out, or give another model."
        )
    if target_layer:
        (target,) = _inner_names(network, [target_layer])
    else:
        target = _target(network, trace, require_map=require_map)
    if target_layer:
        trace.map_of(target)
    return Classifier(
        network,
        input=input,
        architecture=architecture or type(network).__name__,
        source=source,
        classes=found,
        target_layer=f"network.{target}" if target else "",
        taps=_choose_taps(network, trace, target, taps),
        file_names=file_names,
        label_names=tuple(label_names) if len(label_names) == found else (),
        multi_label=multi_label,
        probability=trace.probability,
    )


def as_classifier(network: nn.Module, spec: InputSpec | None) -> Classifier:
    """Return a network as a classifier; one that is a classifier already, as it is.

    Raises:
        ModelError: It is not known what the network takes, or it does not take that.
    """
    if isinstance(network, Classifier):
        return network
    if spec is None:
        raise ModelError(
            f"It is not known which images {type(network).__name__} takes. Give input=InputSpec(channels, height, "
            "width, mean=..., std=...), where mean and std are what its training subtracted and divided by."
        )
    return wrap_network(network, input=spec)


def _target(network: nn.Module, trace: Trace, *, require_map: bool) -> str:
    try:
        return find_target_layer(network, trace.spec, trace=trace)
    except ModelError as error:
        if not require_map:
            return ""
        if not isinstance(network, TableMLP):
            raise
        raise ModelError(
            "TableMLP takes rows of a table and has no feature map, so Grad-CAM and VisualBackProp have nothing to "
            "read. Use SimpleGrad alone (require_map=False in Python), or give a model of images."
        ) from error


def _choose_taps(network: nn.Module, trace: Trace, target: str, taps: Sequence[Tap | str] | None) -> tuple[Tap, ...]:
    """Return the taps given, checked and completed, or derived ones; names inside the classifier."""
    if taps is None:
        chosen = derive_taps(network, trace.spec, target_layer=target, trace=trace) if target else ()
    else:
        names = _inner_names(network, [tap if isinstance(tap, str) else tap.layer for tap in taps])
        derived = derive_taps(network, trace.spec, layers=names, trace=trace)
        given = {name: tap for name, tap in zip(names, taps, strict=True) if isinstance(tap, Tap)}
        chosen = tuple(given[tap.layer]._replace(layer=tap.layer) if tap.layer in given else tap for tap in derived)
    return tuple(tap._replace(layer=f"network.{tap.layer}") for tap in chosen)


def _inner_names(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Return layers' names inside the network, given those or their names inside the classifier.

    Raises:
        ModelError: One stands there twice.
    """
    known = {inner for inner, _ in network.named_modules()}
    found = [name if name in known else name.removeprefix("network.") for name in names]
    if len(set(found)) < len(found):
        raise ModelError("the taps name a layer twice. Name each once.")
    return found


def rebuild(known: Recognised, state: Mapping[str, Tensor], spec: InputSpec) -> nn.Module:
    """Return the network with the weights given."""

    def build() -> nn.Module:
        network = build_network(
            known.source,
            known.architecture,
            classes=known.classes,
            channels=known.channels,
            size=(spec.height, spec.width),
            shapes=shapes_of(state),
        )
        if known.head is not None:
            network.set_submodule(known.head.module, known.head.build())
        return network

    network = build_without_memory(build)
    _assign(network, state)
    if any(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()]):
        network = build()
        _assign(network, state)
    return network


def _assign(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the weights in place; batch norm's counters, which old files lack, start at zero."""
    own = network.state_dict()
    counters = {n: torch.zeros_like(t) for n, t in own.items() if n.endswith("num_batches_tracked") and n not in state}
    own.update({name: tensor for name, tensor in state.items() if name in own} | counters)
    try:
        # `own` keeps its version numbers, which MNASNet's loading asks for and safetensors does not keep.
        network.load_state_dict(own, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the weights do not fit {type(network).__name__}: {error}") from error


def _default_input(known: Recognised, state: Mapping[str, Tensor]) -> InputSpec:
    try:
        return default_input(known.source, known.architecture, known.channels, shapes_of(state))
    except ValueError as error:
        raise ModelError(f"the input of {known.architecture} with these weights cannot be made: {error}.") from error


def _choose_input(defaults: InputSpec, card: Mapping[str, object], flags: _Flags) -> InputSpec:
    """Return the images a model takes: arguments over card over defaults."""
    given = _card_size(card)
    if given is not None and given[0] != defaults.channels:
        raise ModelError(
            f"the card says {given[0]} channels, but the first convolution takes {defaults.channels}. The card does "
            "not belong to these weights: correct or remove it."
        )
    if flags.input_size is None:
        size = (defaults.height, defaults.width) if given is None else given[1:]
    else:
        size = (flags.input_size, flags.input_size) if isinstance(flags.input_size, int) else flags.input_size
    means = tuple(map(float, flags.mean)) if flags.mean is not None else _numbers(card, "mean") or defaults.mean
    stds = tuple(map(float, flags.std)) if flags.std is not None else _numbers(card, "std") or defaults.std
    if flags.any_channels:
        means, stds = (_fit_channels(values, defaults.channels) for values in (means, stds))
    try:
        return InputSpec(defaults.channels, *size, mean=means, std=stds)
    except ValueError as error:
        raise ModelError(f"the model's input cannot be set up: {error}. Correct the card or the flags.") from error


def _fit_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return numbers of colours averaged for grey, or grey's one for every colour."""
    if channels == 1:
        return (sum(values) / len(values),)
    return values * channels if len(values) == 1 else values


def _first_channels(network: nn.Module) -> int | None:
    return next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), None)


def _own_architecture(card: Mapping[str, object]) -> str | None:
    """Return the architecture that a card names, with its source."""
    architecture, source = _text(card, "architecture"), _text(card, "source")
    if architecture is None:
        return None
    if source in OWN_CODE:
        raise ModelError(f"the card says that {describe_own_code(architecture)}")
    return f"{source}:{architecture}" if source else architecture


def describe_own_code(architecture: str) -> str:
    """Return what to do with weights of somebody's own network."""
    return (
        f"{architecture} is a network of its owner's own code, which weights alone do not rebuild. Give --factory "
        "PACKAGE.MODULE:CALLABLE, which makes it (network=... in Python), or --arch."
    )


def _own_name(card: Mapping[str, object]) -> str | None:
    """Return the name that a card has for a network of one's own."""
    return _text(card, "architecture") if _text(card, "source") in OWN_CODE else None


def _fill(network: nn.Module, found: ModelFile, arch: str | None) -> tuple[nn.Module, dict[str, str], tuple[str, ...]]:
    """Return a copy of a user's network with a file's weights, its names of tensors to the file's, and notes."""
    if arch is not None or found.module is not None:
        other = "an architecture (--arch)" if arch is not None else "a pickled module in the file"
        raise ModelError(f"a network of your own and {other} were given: give one of the two.")
    network = copy_network(network)
    own = network.state_dict()
    plain = Reading("", {name: name for name in found.tensors}, ())
    readings = [plain, *list_readings(shapes_of(found.tensors))]
    reading = next((each for each in readings if not any(_differences(each.names, own))), plain)
    for what, wrong in zip(("lacks", "has, beyond them,"), _differences(reading.names, own), strict=True):
        if wrong:
            raise ModelError(
                f"the file must hold the tensors of {type(network).__name__}, but {what} {len(wrong)} "
                f"({', '.join(wrong[:4])}). Give the weights of this network."
            )
    _assign(network, {name: found.tensors[file_name] for file_name, name in reading.names.items()})
    done = describe_reading(reading)
    notes = (f"Taken as {type(network).__name__}: {'; '.join(done)}.",) if done else ()
    return network, {name: file_name for file_name, name in reading.names.items()}, notes


def _differences(names: Mapping[str, str], own: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return which tensors of a network are not in a file, and which in the file are not the network's."""
    given = set(names.values())
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    return missing, [name for name in given if name not in own]


def _card_channels(card: Mapping[str, object]) -> int | None:
    size = _card_size(card)
    return size[0] if size is not None else None


def _card_size(card: Mapping[str, object]) -> tuple[int, int, int] | None:
    """Return channels, height and width of a card's ``input_size``."""
    match card.get("input_size"):
        case None:
            return None
        case [int(channels), int(height), int(width)]:
            return channels, height, width
        case other:
            raise ModelError(
                f"the card's input_size must be [channels, height, width], but came {_shown(other)}. Correct it."
            )


def _card_taps(card: Mapping[str, object]) -> list[Tap | str] | None:
    """Return a card's taps, given as {layer, kernel, stride} or [layer, kernel, stride]."""
    listed = card.get("taps")
    if listed is None:
        return None
    if not isinstance(listed, list | tuple) or len(listed) > _MOST_TAPS:
        came = f"{len(listed)} entries" if isinstance(listed, list | tuple) else type(listed).__name__
        raise ModelError(f"the card's taps must be a list of at most {_MOST_TAPS}, but came {came}. Correct the card.")
    return [_card_tap(entry) for entry in listed]


def _card_tap(entry: object) -> Tap:
    values = [entry.get(key) for key in Tap._fields] if isinstance(entry, Mapping) else entry
    match values:
        case [str(layer), int(kernel), int(stride)] if 1 <= stride <= kernel <= 64:
            return Tap(layer, kernel, stride)
    raise ModelError(
        f"a tap in the card must hold layer, kernel and stride, but came {_shown(entry)}. Correct the card."
    )


def _shown(value: object) -> str:
    """Return what stands in a card, short: it may be nested deep, or have very many digits."""
    try:
        return reprlib.repr(value)[:80]
    except ValueError:
        return "a number of very many digits"


def _text(card: Mapping[str, object], key: str) -> str | None:
    value = card.get(key)
    if value is not None and not isinstance(value, str):
        raise ModelError(f"the card's {key} must be text, but came {_shown(value)}. Correct or remove it.")
    return value or None


def _names(card: Mapping[str, object]) -> tuple[str, ...]:
    """Return a card's names of classes; none where they are not a list of texts."""
    names = card.get("label_names")
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def _whole(card: Mapping[str, object], key: str) -> int | None:
    """Return a card's whole number."""
    value = card.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31):
        raise ModelError(
            f"the card's {key} must be a whole number of 1 to 2^31 - 1, but came {_shown(value)}. Correct it."
        )
    return value


def _numbers(card: Mapping[str, object], key: str) -> tuple[float, ...] | None:
    value = card.get(key)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(
        isinstance(number, int | float) and abs(number) <= _LARGEST_NUMBER for number in value
    ):
        raise ModelError(f"the card's {key} must be a list of usual numbers, but came {_shown(value)}. Correct it.")
    return tuple(map(float, value))
