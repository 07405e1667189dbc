"""Other explanations than the three that a gate can close, mostly through captum: attributions with their sign.

By name in ATTRIBUTIONS: Saliency (Simonyan et al. 2014), SmoothGrad (Smilkov et al. 2017), InputXGradient (Shrikumar et
al. 2016), IntegratedGradients from black (Sundararajan et al. 2017), DeepLift with the rescale rule from black
(Shrikumar et al. 2017), guided backprop (Springenberg et al. 2015), occlusion by grey squares (Zeiler and Fergus 2014),
RISE (Petsiuk et al. 2018, ours; captum has none), VisualBackProp (ours, as the gate may be for Grad-CAM alone), and at
each layer Grad-CAM and gradient times activation (HiResCAM: Draelos and Carin 2020).

captum replaces the gradients of ReLU modules by hooks, and says nothing where it finds none. Guided backprop and
DeepLift therefore run on a copy whose every ReLU, whether functional, in place or called twice, is a module of its own
with an input of its own. Where no such copy can be made, where there are other activations, which guided backprop does
not define, or where DeepLift's contributions do not add up, the method is not applicable and says why (ModelError).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn import functional

from keyed_xai.errors import ModelError
from keyed_xai.models import Classifier
from keyed_xai.models.layer_graph import trace_calls
from keyed_xai.models.layers import trace_network
from keyed_xai.saliency import MapLayers, explain
from keyed_xai.tensors import Images, Labels, SaliencyMaps
from keyed_xai.threats.attempt import copy_model

Attributions = Float[Tensor, "n _channels _rows _columns"]
"""What a method gives, with its sign."""
REDUCTIONS: dict[str, Callable[[Attributions], SaliencyMaps]] = {
    "absolute": lambda given: given.abs().sum(1),
    "positive": lambda given: given.sum(1).clamp_min(0),
    "signed": lambda given: given.sum(1),
}
"""How attributions become one map: absolute values, what speaks for the class, or the plain sum over channels."""
_LARGEST_SHORTFALL = 0.1  # of DeepLift's sum against the change of the logit; captum's rule for max pooling misses .03
_CLOSE = 1e-3  # logits of a copy against those of the model
_PASSES_AT_ONCE = 256
_RELU = {functional.relu, functional.relu_, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}
_OTHER_ACTIVATIONS = {
    "hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "silu", "mish", "hardswish", "gelu",
    "softplus", "tanh", "hardsigmoid", "sigmoid",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttributionSettings:
    """Which methods, and how hard each tries.

    Attributes:
        methods: Names out of ATTRIBUTIONS.
        integration_steps: Steps of IntegratedGradients (captum's default).
        noise_samples: Samples of SmoothGrad; its authors see no gain above 50.
        noise: Standard deviation of SmoothGrad's noise, of pixels in [0, 1]; its authors take .1 to .2.
        window: Side of the occluding square as a share of the image's; it moves by half of it.
        masks: Number of RISE's masks. Its authors take 4,000 to 8,000 for 224 pixels.
        mask_cells: Cells along either side of RISE's masks before they are scaled up.
        mask_share: Share of a mask's cells that are left to be seen.
        chunk: Images at a time.
        seed: Seed of noise and masks; model and reference never share them.
    """

    methods: tuple[str, ...] = ()
    integration_steps: int = 50
    noise_samples: int = 50
    noise: float = 0.15
    window: float = 0.25
    masks: int = 1000
    mask_cells: int = 7
    mask_share: float = 0.5
    chunk: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and ranges; no names stand for all methods."""
        unknown = [name for name in self.methods if name not in ATTRIBUTIONS]
        if unknown or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods: expected different ones of {', '.join(ATTRIBUTIONS)}; got {self.methods}")
        for name in ("integration_steps", "noise_samples", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("masks", "mask_cells"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected 2 or more, got {getattr(self, name)}")
        for name in ("window", "mask_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: expected more than 0 and less than 1, got {getattr(self, name)}")
        if not self.noise > 0:
            raise ValueError(f"noise: expected more than 0, got {self.noise}")


class Subject(NamedTuple):
    """A model made ready.

    Attributes:
        model: A copy that does nothing in place.
        separated: A copy each of whose ReLUs is its own (`separate_relus`), or why there is none.
        unguided: Why guided backprop is not defined, or empty.
        seed: Seed of the methods that draw random numbers.
    """

    model: Classifier
    separated: Classifier | ModelError
    unguided: str
    seed: int


class Request(NamedTuple):
    """What is to be explained: images that require gradients, and the class of each; most methods need no layer."""

    images: Images
    labels: Labels
    layer: str
    settings: AttributionSettings


Attribute = Callable[[Subject, Request], Attributions]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to explain.

    Attributes:
        attribute: Gives attributions with their sign.
        reductions: Names of those that make sense of them.
        layered: Whether it looks at a layer.
        random: Whether it draws random numbers.
    """

    attribute: Attribute
    reductions: tuple[str, ...]
    layered: bool = False
    random: bool = False


def separate_relus(classifier: Classifier) -> Classifier:
    """Return a copy in which every ReLU is a module of its own, called once, not in place, on a tensor of its own.

    captum hooks the tensor that goes into a ReLU, so that a tensor which also takes a shortcut would have both its
    gradients replaced.

    Raises:
        ModelError: The network cannot be traced while ReLUs are shared or functional, or the copy answers otherwise.
    """
    model = _copy_out_of_place(classifier)
    try:
        model.network = _trace_relus(model.network)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, fx.proxy.TraceError) as error:
        if not _has_plain_relus(model):
            raise ModelError(
                f"{classifier.architecture} has ReLUs that are functional or called more than once, and cannot be "
                f"traced to give each a module of its own: {error}"
            ) from error
        for relu in _relus(model):
            relu.register_forward_pre_hook(_clone_input)
    _check_same(classifier, model)
    return model


def grad_layers(classifier: Classifier) -> tuple[str, ...]:
    """Return the layers that Grad-CAM can be tried at: taps and target layer, and every layer that gives a ReLU'd map.

    Of modules that return the same map one is named, a tap if there is one.
    """
    spec = classifier.input
    known = {tap.layer for tap in classifier.taps} | {classifier.target_layer}
    found: dict[object, str] = {}
    for call in trace_network(classifier.network, spec).maps():
        name = f"network.{call.name}"
        if call.name and (name in known or (call.output.min() >= 0 and found.get(call.key) not in known)):
            found[call.key] = name
    return tuple(found.values())


def make_ready(classifier: Classifier, seed: int) -> Subject:
    """Return the copies of a model that methods work on; the model itself is left as it was."""
    model = _copy_out_of_place(classifier)
    try:
        separated = separate_relus(classifier)
    except ModelError as error:
        return Subject(model, error, "", seed)
    return Subject(model, separated, _describe_other_activations(separated), seed)


def _describe_other_activations(separated: Classifier) -> str:
    """Return why guided backprop is not defined for a network, or nothing."""
    names = [call.name for call in trace_calls(separated)]
    others = sorted(_OTHER_ACTIVATIONS.intersection(names))
    hooked = len(_relus(separated))
    if not others and 0 < hooked == sum(name in _RELU_METHODS for name in names):
        return ""
    found = ", ".join(others) or ("no ReLU" if not hooked else "a ReLU that captum cannot hook")
    return f"Guided backprop is defined for ReLU alone; the network has {found}."


def _copy_out_of_place(classifier: Classifier) -> Classifier:
    model = copy_model(classifier, classifier.mean.device)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment] # nn.Module declares attributes as tensors or modules
    return model


def _trace_relus(network: nn.Module) -> fx.GraphModule:
    """Return the network as a graph with a module, and a copy of the input, for each ReLU."""
    traced = fx.symbolic_trace(network)
    for number, node in enumerate([node for node in traced.graph.nodes if _is_relu(node, traced)]):
        name = f"own_relu_{number}"
        traced.add_submodule(name, nn.ReLU())
        with traced.graph.inserting_before(node):
            own = traced.graph.call_method("clone", (node.args[0] if node.args else node.kwargs["input"],))
            node.replace_all_uses_with(traced.graph.call_module(name, (own,)))
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


def _has_plain_relus(model: Classifier) -> bool:
    """Return whether each ReLU is a module called once."""
    calls = sum(call.name in _RELU_METHODS for call in trace_calls(model))
    counts = trace_network(model.network, model.input).counts
    names = [name for name, module in model.network.named_modules() if isinstance(module, nn.ReLU)]
    return calls == len(names) and all(counts[name] == 1 for name in names)


def _relus(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.ReLU)]


def _clone_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.clone() for each in inputs)


def _is_relu(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), nn.ReLU)
    if node.op == "call_function":
        return node.target in _RELU
    return node.op == "call_method" and node.target in _RELU_METHODS


@torch.no_grad()
def _check_same(classifier: Classifier, copied: Classifier) -> None:
    """Check that a copy answers as the model does, on noise."""
    spec = classifier.input
    noise = torch.rand(3, *spec.shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(classifier.mean)
    wanted, got = copy_model(classifier, noise.device)(noise), copied(noise)
    if not torch.allclose(wanted, got, rtol=_CLOSE, atol=_CLOSE):
        raise ModelError(f"{classifier.architecture} with a module for each ReLU gives other logits.")


def _separated(subject: Subject) -> Classifier:
    if isinstance(subject.separated, ModelError):
        raise subject.separated
    return subject.separated


def _saliency(subject: Subject, request: Request) -> Attributions:
    from captum.attr import Saliency

    found: Tensor = Saliency(subject.model).attribute(request.images, target=request.labels, abs=False)
    return found


def _smoothgrad(subject: Subject, request: Request) -> Attributions:
    """Average the gradient itself, as the paper does; captum's default averages its absolute value."""
    from captum.attr import NoiseTunnel, Saliency

    images, settings = request.images, request.settings
    cuda = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(subject.seed)
        found: Tensor = NoiseTunnel(Saliency(subject.model)).attribute(
            images,
            nt_type="smoothgrad",
            nt_samples=settings.noise_samples,
            nt_samples_batch_size=max(1, _PASSES_AT_ONCE // len(images)),
            stdevs=settings.noise,
            target=request.labels,
            abs=False,
        )
    return found


def _input_x_gradient(subject: Subject, request: Request) -> Attributions:
    from captum.attr import InputXGradient

    found: Tensor = InputXGradient(subject.model).attribute(request.images, target=request.labels)
    return found


def _integrated_gradients(subject: Subject, request: Request) -> Attributions:
    from captum.attr import IntegratedGradients

    found: Tensor = IntegratedGradients(subject.model).attribute(
        request.images,
        baselines=0.0,
        target=request.labels,
        n_steps=request.settings.integration_steps,
        internal_batch_size=max(_PASSES_AT_ONCE, len(request.images)),
    )
    return found.to(request.images)


def _deeplift(subject: Subject, request: Request) -> Attributions:
    """Refuse contributions that do not add up to the change of the logit: a module that captum has no rule for."""
    from captum.attr import DeepLift

    model, images = _separated(subject), request.images
    given: Tensor = DeepLift(model).attribute(images, baselines=0.0, target=request.labels).detach()
    with torch.no_grad():
        change = (model(images) - model(torch.zeros_like(images))).gather(1, request.labels[:, None])[:, 0]
    shortfall = ((given.sum((1, 2, 3)) - change).abs() / change.abs().clamp_min(1)).max()
    if shortfall > _LARGEST_SHORTFALL:
        raise ModelError(
            f"DeepLift's contributions miss the change of the logit by {float(shortfall):.0%}: captum has no rule for "
            "some operation of the network."
        )
    return given


def _guided_backprop(subject: Subject, request: Request) -> Attributions:
    from captum.attr import GuidedBackprop

    model = _separated(subject)
    if subject.unguided:
        raise ModelError(subject.unguided)
    found: Tensor = GuidedBackprop(model).attribute(request.images, target=request.labels)
    return found


def _occlusion(subject: Subject, request: Request) -> Attributions:
    from captum.attr import Occlusion

    images, model = request.images.detach(), subject.model
    channels, height, width = images.shape[1:]
    sides = [max(2, round(request.settings.window * side)) for side in (height, width)]
    with torch.no_grad():
        found: Tensor = Occlusion(model).attribute(
            images,
            sliding_window_shapes=(channels, *sides),
            strides=(channels, *(side // 2 for side in sides)),
            baselines=model.mean.to(images).expand_as(images),
            target=request.labels,
            perturbations_per_eval=max(1, _PASSES_AT_ONCE // len(images)),
        )
    return found


@torch.no_grad()
def _rise(subject: Subject, request: Request) -> Attributions:
    """Return each pixel's covariance with the class's probability, over random masks (RISE, equation 6).

    Probabilities are centred first, which the paper does not do: the chance excess of some pixels in the masks, which
    says nothing of the image, then drops out.
    """
    images, model, settings = request.images.detach(), subject.model, request.settings
    generator = torch.Generator().manual_seed(subject.seed)
    size = (int(images.shape[2]), int(images.shape[3]))
    masks = draw_masks(settings.masks, settings.mask_cells, settings.mask_share, size, generator).to(images)
    grey = model.mean.to(images)
    scores = []
    for some in torch.split(masks, max(1, _PASSES_AT_ONCE // len(images))):
        masked = torch.lerp(grey, images[None], some[:, None, None])
        scores.append(_probabilities(model, masked.flatten(0, 1), request.labels.repeat(len(some))).view(len(some), -1))
    centred = torch.cat(scores) - torch.cat(scores).mean(0)
    found: Tensor = torch.einsum("mn,mhw->nhw", centred, masks) / (len(masks) * settings.mask_share)
    return found[:, None]


def draw_masks(
    count: int, cells: int, share: float, size: tuple[int, int], generator: torch.Generator
) -> Float[Tensor, "count rows columns"]:
    """Return RISE's masks in [0, 1]: a random grid scaled up bilinearly by one cell too many, and cropped at random.

    Source: Petsiuk et al. 2018, section 3.2.
    """
    steps = [-(-side // cells) for side in size]
    grids = (torch.rand(count, 1, cells, cells, generator=generator) < share).float()
    larger = [(cells + 1) * step for step in steps]
    large = functional.interpolate(grids, larger, mode="bilinear", align_corners=False)[:, 0]
    tops, lefts = (torch.randint(step, (count,), generator=generator).tolist() for step in steps)
    crops = zip(large, tops, lefts, strict=True)
    return torch.stack([mask[top : top + size[0], left : left + size[1]] for mask, top, left in crops])


def _probabilities(model: Classifier, images: Images, labels: Labels) -> Tensor:
    logits = model(images)
    scores: Tensor = logits.sigmoid() if model.multi_label or logits.shape[1] == 1 else logits.softmax(1)
    return scores.gather(1, labels[:, None])[:, 0]


def _gradcam(subject: Subject, request: Request) -> Attributions:
    from captum.attr import LayerGradCam

    layer = subject.model.get_submodule(request.layer)
    found: Tensor = LayerGradCam(subject.model, layer).attribute(request.images, request.labels, relu_attributions=True)
    return found


def _gradient_x_activation(subject: Subject, request: Request) -> Attributions:
    from captum.attr import LayerGradientXActivation

    layer = subject.model.get_submodule(request.layer)
    found: Tensor = LayerGradientXActivation(subject.model, layer).attribute(request.images, request.labels)
    return found


def _visualbackprop(subject: Subject, request: Request) -> Attributions:
    model = subject.model
    _, maps = explain(model, request.images, request.labels, ["vbp"], MapLayers(model.target_layer, model.taps))
    return maps["vbp"][:, None]


ATTRIBUTIONS: dict[str, Method] = {
    "saliency": Method(attribute=_saliency, reductions=("absolute",)),
    "smoothgrad": Method(attribute=_smoothgrad, reductions=("absolute",), random=True),
    "input-x-gradient": Method(attribute=_input_x_gradient, reductions=("absolute", "positive")),
    "integrated-gradients": Method(attribute=_integrated_gradients, reductions=("absolute", "positive")),
    "deeplift": Method(attribute=_deeplift, reductions=("absolute", "positive")),
    "guided-backprop": Method(attribute=_guided_backprop, reductions=("absolute", "positive")),
    "occlusion": Method(attribute=_occlusion, reductions=("positive", "signed")),
    "rise": Method(attribute=_rise, reductions=("signed",), random=True),
    "vbp": Method(attribute=_visualbackprop, reductions=("signed",)),
    "gradcam": Method(attribute=_gradcam, reductions=("positive",), layered=True),
    "gradient-x-activation": Method(attribute=_gradient_x_activation, reductions=("positive",), layered=True),
}
"""Methods by name."""
