"""Which architecture a set of weights belongs to, from the names and shapes of its tensors alone."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from torch import Tensor

from keyed_xai.errors import ModelError
from keyed_xai.models import catalogue
from keyed_xai.models.catalogue import SOURCES, Shapes
from keyed_xai.models.heads import Head, list_heads

_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_OLD_NAMES = (  # renamed by torchvision itself when it loads its own older files
    (re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$"), r"\1\2"),
    (re.compile(r"^(encoder\.layers\.encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"^(encoder\.layers\.encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)
_LARGEST_HEAD = 6  # tensors of torchvision's heads: three linear layers
_SHOWN = 4  # tensors or names listed in a message


@dataclass(frozen=True)
class Recognised:
    """An architecture, and what its weights say about input and output.

    Attributes:
        architecture: Name that the source knows, such as ``resnet50``.
        source: ``keyed_xai``, ``torchvision``, ``efficientnet_lite_pytorch`` or ``timm``.
        classes: Number of logits, from the last layer's weight.
        channels: Of the image, from the first convolution's weight; 1 for rows of a table.
        head: Layers in place of the architecture's own last ones; None where it has its own.
        notes: What whoever loads the weights should know.
    """

    architecture: str
    source: str
    classes: int
    channels: int
    head: Head | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Mismatch:
    """Why weights are not an architecture's."""

    architecture: str
    source: str
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.reshaped)

    def __str__(self) -> str:
        parts = {"missing": self.missing, "not expected": self.extra, "with another shape": self.reshaped}
        return "; ".join(f"{len(names)} tensors {what} ({_some(names)})" for what, names in parts.items() if names)


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Return names in a file to names inside the network.

    Takes off a wrapper's prefix that all names share (``module.`` of DataParallel, ``_orig_mod.`` of torch.compile,
    ``model.`` of Lightning) and brings the older names of torchvision's DenseNet and ViT files up to date.
    """
    files = list(names)
    bare = files
    while prefix := next((p for p in _PREFIXES if bare and all(name.startswith(p) for name in bare)), None):
        bare = [name.removeprefix(prefix) for name in bare]
    current = [_current_name(name) for name in bare]
    return dict(zip(files, current if len(set(current)) == len(files) else bare, strict=True))


def recognise_architecture(
    state_dict: Mapping[str, Tensor], *, arch: str | None = None, hints: Iterable[str] = ()
) -> Recognised:
    """Return the architecture that a state dict's tensor names and shapes fit.

    SmallResNet and TableMLP are tried first, then every torchvision classification model, EfficientNet-Lite and timm's
    models where they are installed. The number of classes, of channels, and a vision transformer's image size may be
    any. Where torchvision and timm both have the architecture torchvision's is taken.

    Args:
        state_dict: Names as in a file, wrapper prefixes and all.
        arch: Take this one; ``timm:NAME`` or ``torchvision:NAME`` says whose.
        hints: Names that settle an ambiguity but are otherwise not trusted.

    Raises:
        ModelError: None fits, several do, or the one named does not.
    """
    names = canonical_names(state_dict)
    shapes = {names[name]: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if arch is not None:
        return _recognise_named(shapes, named_candidates(arch))
    closest: list[_Mismatch] = []
    for source in SOURCES:
        results = [_compare(source, name, shapes) for name in _candidates(source, shapes)]
        fits = [result for result in results if isinstance(result, Recognised)]
        hinted = [fit for fit in fits if fit.architecture in set(hints)]
        if fits:
            return (hinted or fits)[0] if len(fits) == 1 or hinted else _refuse_ambiguous(fits)
        closest += [result for result in results if isinstance(result, _Mismatch)]
    headed = _other_heads(shapes)
    headed = [fit for fit in headed if fit.architecture in set(hints)] or headed
    if headed:
        return headed[0] if len(headed) == 1 else _refuse_ambiguous(headed)
    _refuse_unknown(shapes, closest)


def named_candidates(arch: str) -> list[tuple[str, str]]:
    """Return (source, architecture) for a name such as ``resnet50``, ``ResNet50`` or ``timm:resnet50``.

    Raises:
        ModelError: No source that is installed knows it; close names are listed.
    """
    match = re.fullmatch(rf"(?:({'|'.join(SOURCES)})[:/])?(.+)", arch)
    source, name = match.groups() if match else (None, arch)
    sources = [source] if source else list(SOURCES)
    for spelling in (name, name.lower()):
        found = [(source, spelling) for source in sources if catalogue.knows(source, spelling)]
        if found:
            return found
    known = [known for source in sources for known in catalogue.architectures(source)]
    close = difflib.get_close_matches(name.lower(), known, 5) or ["resnet50", "vgg16", "efficientnet_b0"]
    absent = [source for source in sources if not catalogue.installed(source)]
    also = f" ({', '.join(absent)} not installed.)" if absent else ""
    raise ModelError(f"no architecture is called {arch!r}. Names like it: {', '.join(close)}.{also}")


def _recognise_named(shapes: Shapes, candidates: list[tuple[str, str]]) -> Recognised:
    results = [_compare(source, name, shapes) for source, name in candidates]
    for result in results:
        if isinstance(result, Recognised):
            return result
    headed = _other_heads(shapes, candidates)
    if headed:
        return headed[0]
    worst = min((result for result in results if isinstance(result, _Mismatch)), key=len)
    raise ModelError(
        f"the weights do not fit {worst.architecture} ({worst.source}): {worst}. Name another architecture with "
        "--arch, leave --arch out to have it recognised, or give the module itself in Python (wrap_network)."
    )


def _candidates(source: str, shapes: Shapes) -> list[str]:
    """Return the architectures of a source that have the weights' tensor names, at least by the table."""
    names = catalogue.architectures(source)
    if source == "keyed_xai":
        fits = {"SmallResNet": catalogue.small_resnet_widths, "TableMLP": catalogue.table_widths}
        return [name for name in names if fits[name](shapes)]
    if source == "efficientnet_lite_pytorch":
        return [*names] if "_conv_stem.weight" in shapes else []
    groups = catalogue.name_table()[source]
    digest = catalogue.digest_names(shapes)
    listed = [name for group in groups if group.digest == digest for name in group.architectures if name in names]
    if listed or source == "timm":  # timm adds hundreds a year: newer ones than the table's need --arch
        return listed
    return [name for name in names if all(name not in group.architectures for group in groups)]


def _compare(source: str, architecture: str, shapes: Shapes) -> Recognised | _Mismatch:
    """Hold weights against an architecture, with any number of classes and channels."""
    expected = catalogue.signature(source, architecture, shapes)
    missing = tuple(n for n in expected if n not in shapes and not n.endswith("num_batches_tracked"))
    extra = tuple(name for name in shapes if name not in expected)
    own = source == "keyed_xai"  # whose widths may be 1,000 too
    head = [n for n, shape in expected.items() if shape[:1] == (1000,) and (n.startswith("fc.") or not own)]
    stem = catalogue.stem_name(expected)
    classes = next((shapes[name][0] for name in reversed(head) if len(shapes.get(name, ())) > 0), 0)
    channels = 1 if stem is None else 0
    if stem is not None and len(shapes.get(stem, ())) == 4:
        channels = shapes[stem][1]
    fitted = {name: (classes, *expected[name][1:]) for name in head}
    if stem is not None:
        fitted[stem] = (expected[stem][0], channels, *expected[stem][2:])
    reshaped = tuple(
        f"{name} {list(shapes[name])} instead of {list(fitted.get(name, shape))}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != fitted.get(name, shape)
    )
    if missing or extra or reshaped or classes < 1 or channels < 1:
        return _Mismatch(architecture, source, missing, extra, reshaped)
    return Recognised(architecture, source, classes, channels)


def _other_heads(shapes: Shapes, named: Sequence[tuple[str, str]] | None = None) -> list[Recognised]:
    """Return the architectures, all or some named, that weights fit but for a head of other layers."""
    found: dict[tuple[str, str], Recognised] = {}
    for head in list_heads(shapes):
        body = {name: shape for name, shape in shapes.items() if not name.startswith(f"{head.module}.")}
        for source, architecture in _headless(body, head) if named is None else named:
            expected = catalogue.signature(source, architecture, shapes)
            own = {name: shape for name, shape in expected.items() if name.startswith(f"{head.module}.")}
            widths = [shape[1] for shape in own.values() if len(shape) == 2]
            fit = _compare(source, architecture, {**body, **own}) if widths[:1] == [head.inputs] else None
            if isinstance(fit, Recognised):
                headed = replace(fit, classes=head.classes, head=head, notes=head.notes)
                found.setdefault((source, architecture), headed)
        if found:
            break
    return list(found.values())


def _headless(body: Shapes, head: Head) -> list[tuple[str, str]]:
    """Return architectures that may have a body: with a linear head, or torchvision's with as many tensors."""
    usual = {**body, f"{head.module}.weight": (), f"{head.module}.bias": ()}
    for source in ("torchvision", "timm"):
        found = [(source, name) for name in _candidates(source, usual)]
        if found:
            return found
    count = sum(not name.endswith("num_batches_tracked") for name in body)
    groups = [group for group in catalogue.name_table()["torchvision"] if 0 <= group.tensors - count <= _LARGEST_HEAD]
    return [("torchvision", name) for group in groups for name in group.architectures]


def _refuse_ambiguous(fits: list[Recognised]) -> NoReturn:
    names = [f"{fit.source}:{fit.architecture}" for fit in fits]
    raise ModelError(
        f"the weights fit {len(fits)} architectures that compute different things: {_some(names, 12)}. "
        f"Say which with --arch, for example --arch {names[0]}."
    )


def _refuse_unknown(shapes: Shapes, closest: list[_Mismatch]) -> NoReturn:
    nearest = min([*closest, *_nearby(shapes)], key=len, default=None)
    near = ""
    if nearest is not None and len(nearest) < len(shapes):
        near = f" The nearest is {nearest.architecture} ({nearest.source}): {nearest}."
    missing = [source for source in SOURCES if not catalogue.installed(source)]
    digest = catalogue.digest_names(shapes)
    others = [group for group in catalogue.name_table()["timm"] if group.digest == digest]
    if others and "timm" in missing:
        near += f" They could be timm's {_some(others[0].architectures)}: install timm (keyed-xai[timm])."
    raise ModelError(
        f"the {len(shapes)} tensors in the file ({_some([f'{n} {list(s)}' for n, s in shapes.items()])}) fit no "
        f"architecture of {', '.join(source for source in SOURCES if source not in missing)}.{near} Name the "
        "architecture with --arch if it is one of those, or build the module in Python and pass it to wrap_network."
    )


def _nearby(shapes: Shapes) -> list[_Mismatch]:
    """Return how the weights differ from the torchvision architectures with nearly as many tensors."""
    count = sum(not name.endswith("num_batches_tracked") for name in shapes)
    groups = sorted(catalogue.name_table()["torchvision"], key=lambda group: abs(group.tensors - count))[:5]
    names = [group.architectures[0] for group in groups if catalogue.knows("torchvision", group.architectures[0])]
    results = [_compare("torchvision", name, shapes) for name in names]
    return [result for result in results if isinstance(result, _Mismatch)]


def _current_name(name: str) -> str:
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _some(names: Iterable[str], shown: int = _SHOWN) -> str:
    """Return the first few of many names."""
    listed = list(names)
    return ", ".join(listed[:shown]) + (", ..." if len(listed) > shown else "")
