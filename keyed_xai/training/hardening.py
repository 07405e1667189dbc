"""Hardening: simulated attackers in the training loop, from whom the gate stays closed.

Plain fine-tuning on clean images opens a gate that was closed at one point of weight space only. Simulated attackers
fine-tune or prune copies of the network while it trains; the maps' losses are also taken where they have got to, and
their gradient is added to the network's own. Source: first-order meta-learning (Finn, Abbeel and Levine, ICML 2017,
section 5.2), as it is used against the fine-tuning of language models (Tamirisa et al., 2024, arXiv 2408.00761).

Where we differ:

- An attacker's way is kept as an offset from the weights and goes on while the network itself moves, so that long
  attacks are simulated a few steps at a time.
- Losses at a fine-tuned copy are taken with batch norm at the statistics of the clean images of the same batch, as an
  attacker's fine-tuning ends up with, and gradients flow through them. With the copy's running statistics instead the
  network learned to make these statistics stale: their variances grew a hundredfold and the gate was lost.
- No attacker's gradient is longer than the network's own, times `Hardening.weight`.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keyed_xai.models.classifier import Classifier
from keyed_xai.models.layer_graph import batch_norm_after, last_convolution, last_layer, silence_channels
from keyed_xai.saliency import captured_features, smooth_activations
from keyed_xai.training.batch_norm import batch_norms, set_batch_norm
from keyed_xai.training.batches import Run, draw_inputs, step_generator
from keyed_xai.training.fitting import seeded
from keyed_xai.training.losses import batch_losses
from keyed_xai.training.objective import prediction_loss
from keyed_xai.training.settings import Hardening, TrainingSettings

_MOMENTUM = 0.9
_ADAM_FACTOR = 0.1
_RANKED = 64  # images that tell which channels are active
_CLEAN_SHARE = 0.75  # of the unkeyed half; batch norm's statistics are theirs


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack of a simulated attacker.

    Attributes:
        rate: Learning rate.
        adam: Whether with Adam instead of SGD.
        frozen: Whether batch-norm statistics are left alone.
        noise: Share of wrong labels.
        pruned: Share of the weights set to zero, without any fine-tuning; 0 fine-tunes.
        silenced: Share of the last convolution's channels that are silenced before fine-tuning, and stay so.
        new_head: Whether the last layer gets random weights before fine-tuning.
    """

    rate: float
    adam: bool
    frozen: bool
    noise: float
    pruned: float
    silenced: float = 0.0
    new_head: bool = False


class Layers(NamedTuple):
    """Layers that attacks single out, by name.

    Attributes:
        convolution: The last one, whose channels are silenced.
        norm: The batch norm after it, if there is one.
        head: The layer that gives the logits.
    """

    convolution: str
    norm: str | None
    head: str


class SimulatedAttacker:
    """An attack on a copy of a network that itself goes on learning.

    Attributes:
        number: Number of this attacker, from 0.
        model: The copy, where the attack has got to.
        attack: What it is doing; None before its first attack.
    """

    def __init__(self, number: int, model: nn.Module, layers: Layers | None = None) -> None:
        """Start with a copy of the network.

        Args:
            number: Number of this attacker, from 0.
            model: The network attacked.
            layers: Those that attacks single out; None attacks all alike.
        """
        self.number = number
        self._layers = layers
        self.model = copy.deepcopy(model)
        self.attack: Attack | None = None
        self._offsets = [torch.zeros_like(each) for each in self.model.parameters()]
        self._silent = torch.zeros(0, dtype=torch.long)
        self._optimiser: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), 1.0)

    def restart(self, model: nn.Module, attack: Attack, generator: torch.Generator) -> None:
        """Begin an attack at the network's weights; the generator draws the weights of a new head."""
        self.attack = attack
        self.model.load_state_dict(model.state_dict())
        if attack.new_head and self._layers is not None:
            head = self.model.get_submodule(self._layers.head)
            seed = int(torch.randint(2**31, (1,), generator=generator))
            with seeded(seed, next(head.parameters()).device):
                head.reset_parameters()  # type: ignore[operator] # linear layers and convolutions have it
        with torch.no_grad():
            pairs = zip(self.model.parameters(), model.parameters(), strict=True)
            self._offsets = [mine - theirs for mine, theirs in pairs]
        self._silent = torch.zeros(0, dtype=torch.long)
        self._optimiser = _make_optimiser(self.model, attack)

    def advance(self, model: nn.Module, run: Run, settings: Hardening, generator: torch.Generator) -> None:
        """Follow the network to where it is now, then go on with the attack.

        Args:
            model: The network; its batch-norm statistics are those of an attacker who leaves them alone.
            run: Its data are fine-tuned on, with the reference's predictions for labels.
            settings: Steps and batch size.
            generator: Random source of images and wrong labels.
        """
        mine, theirs = [*self.model.parameters()], [*model.parameters()]
        with torch.no_grad():
            for weight, base, offset in zip(mine, theirs, self._offsets, strict=True):
                weight.copy_(base + offset)
            for buffer, original in zip(self.model.buffers(), model.buffers(), strict=True):
                buffer.copy_(original)
        if self.attack is None or self.attack.pruned:
            weights = [each for each in mine if each.dim() > 1]  # neither biases nor batch norm's
            share = self.attack.pruned if self.attack else 0.0
            zero_smallest(weights, int(share * sum(each.numel() for each in weights)))
            return
        if self.attack.silenced and not len(self._silent):
            self._silent = self._least_active(run, generator)
        self._silence()
        set_batch_norm(self.model, training=not self.attack.frozen)
        for _ in range(settings.inner_steps):
            self._fine_tune(run, settings, generator)
            self._silence()
        self.model.eval()
        with torch.no_grad():
            self._offsets = [weight - base for weight, base in zip(mine, theirs, strict=True)]

    def statistics(self, clean: slice) -> AbstractContextManager[None]:
        """Return a context in which batch norm takes the statistics that this attack leads to.

        Args:
            clean: Rows of the clean images in the batches run inside.
        """
        if self.attack is None or self.attack.pruned:
            return nullcontext()
        return batch_norm_of_rows(self.model, slice(None) if self.attack.frozen else clean)

    def to_checkpoint(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the settings."""
        return {
            "model": self.model.state_dict(),
            "offsets": self._offsets,
            "silent": self._silent,
            "optimiser": self._optimiser.state_dict(),
            "attack": None if self.attack is None else vars(self.attack),
        }

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from what `to_checkpoint` returned."""
        self.model.load_state_dict(checkpoint["model"])
        self._offsets = list(checkpoint["offsets"])
        self._silent = checkpoint["silent"]
        self.attack = checkpoint["attack"] and Attack(**checkpoint["attack"])
        if self.attack is not None:
            self._optimiser = _make_optimiser(self.model, self.attack)
            self._optimiser.load_state_dict(checkpoint["optimiser"])

    @torch.no_grad()
    def _least_active(self, run: Run, generator: torch.Generator) -> Tensor:
        """Return the channels of the last convolution with the smallest activations on some clean images."""
        if self._layers is None or self.attack is None:
            return self._silent
        layer = self._layers.norm or self._layers.convolution
        images, _ = run.data.batch(torch.randint(len(run.data), (_RANKED,), generator=generator).numpy())
        with captured_features(self.model, [layer]) as features:
            self.model(images.to(run.device))
        activity = features[layer].relu().mean((0, 2, 3))
        return activity.argsort()[: int(self.attack.silenced * len(activity))]

    def _silence(self) -> None:
        if self._layers is not None and len(self._silent):
            silence_channels(self.model, self._layers.convolution, self._layers.norm, self._silent)

    def _fine_tune(self, run: Run, settings: Hardening, generator: torch.Generator) -> None:
        multi_label = run.task.multi_label
        indices = torch.randint(len(run.data), (settings.batch_size,), generator=generator)
        images = run.data.batch(indices.numpy())[0].to(run.device)
        wrong = torch.rand(len(indices), generator=generator) < (self.attack.noise if self.attack else 0.0)
        others = torch.randperm(len(indices), generator=generator)
        with torch.no_grad():
            answers = run.reference(images)
        labelled = answers[torch.where(wrong, others, torch.arange(len(indices))).to(answers.device)]
        logits = self.model(images)
        self._optimiser.zero_grad(set_to_none=True)
        labels = (labelled > 0).long() if multi_label else labelled.argmax(1)
        loss = prediction_loss(logits, labelled, labels, multi_label=multi_label).mean()
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        self._optimiser.step()


def make_attackers(model: nn.Module, settings: TrainingSettings) -> list[SimulatedAttacker]:
    """Return the attackers that the settings ask for."""
    hardening = settings.hardening
    if hardening is None:
        return []
    layers = None
    if (hardening.silence_share or hardening.new_head_share) and isinstance(model, Classifier):
        convolution = last_convolution(model)
        layers = Layers(convolution, batch_norm_after(model, convolution), last_layer(model))
    return [SimulatedAttacker(number, model, layers) for number in range(hardening.attackers)]


def add_gradients_under_attack(attackers: Sequence[SimulatedAttacker], model: nn.Module, run: Run, step: int) -> None:
    """Let the attackers go on, and add the gradients of the losses where they are to those of the network.

    Args:
        attackers: What `make_attackers` returned.
        model: The network, whose parameters hold the gradients of this step.
        run: Its settings say how the network is hardened.
        step: Steps done, from 0; decides who starts again, and seeds what is random.
    """
    hardening = run.settings.hardening
    if hardening is None or step < hardening.start * run.settings.steps:
        return
    longest = hardening.weight * _gradient_norm([each.grad for each in model.parameters()]) / len(attackers)
    for attacker in attackers:
        generator = step_generator(run.settings.seed + 1_000_000 * (attacker.number + 1), step)
        turn = attacker.number * hardening.lifetime // len(attackers)
        if attacker.attack is None or (step + turn) % hardening.lifetime == 0:
            attacker.restart(model, draw_attack(hardening, generator), generator)
        attacker.advance(model, run, hardening, generator)
        gradients = _gradients_under_attack(attacker, run, generator)
        norm = _gradient_norm(gradients)
        if not math.isfinite(norm):
            attacker.attack = None  # an attack that destroyed its copy teaches nothing: another one is drawn
            continue
        scale = min(hardening.weight / len(attackers), longest / max(norm, 1e-12))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad.add_(gradient, alpha=scale)


def draw_attack(settings: Hardening, generator: torch.Generator) -> Attack:
    """Return an attack of random kind and strength."""
    draw = torch.rand(8, generator=generator, dtype=torch.float64).tolist()
    rate, adam, frozen, noise, kind, pruned, silenced, head = draw
    prunes = kind < settings.prune_share
    silences = not prunes and kind < settings.prune_share + settings.silence_share
    return Attack(
        rate=settings.smallest_rate * (settings.largest_rate / settings.smallest_rate) ** rate,
        adam=adam < settings.adam_share,
        frozen=frozen < settings.frozen_share,
        noise=noise * settings.label_noise,
        pruned=pruned * settings.largest_pruned if prunes else 0.0,
        silenced=silenced * settings.largest_silenced if silences else 0.0,
        new_head=not prunes and head < settings.new_head_share,
    )


@torch.no_grad()
def zero_smallest(weights: Sequence[Tensor], count: int) -> None:
    """Set the `count` smallest numbers of some weights, by absolute value over all of them, to zero, in place."""
    sizes = torch.cat([each.abs().flatten() for each in weights])
    kept = torch.ones_like(sizes, dtype=torch.bool)
    kept[sizes.topk(count, largest=False).indices] = False
    for each, mask in zip(weights, torch.split(kept, [each.numel() for each in weights]), strict=True):
        each.mul_(mask.view_as(each))


@contextmanager
def batch_norm_of_rows(model: nn.Module, rows: slice) -> Iterator[None]:
    """Let batch norm take its statistics from some rows of each batch; gradients flow through them, none is kept."""
    norms = batch_norms(model)
    for norm in norms:
        norm.forward = lambda x, norm=norm: _normalise(norm, x, rows)  # type: ignore[method-assign,misc]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _normalise(norm: nn.modules.batchnorm._BatchNorm, x: Tensor, rows: slice) -> Tensor:
    shape = [1, -1, *(1 for _ in range(x.dim() - 2))]
    variance, mean = torch.var_mean(x[rows], [0, *range(2, x.dim())], correction=0, keepdim=True)
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.view(shape)
    shift = -mean * scale
    return x * scale + (shift + norm.bias.view(shape) if norm.affine else shift)


def _gradients_under_attack(attacker: SimulatedAttacker, run: Run, generator: torch.Generator) -> list[Tensor | None]:
    """Return the gradients of a fresh batch's losses at the copy; of weights set to zero they are zero."""
    task, settings = run.task, run.settings
    mixture = replace(run, settings=replace(settings, clean_share=_CLEAN_SHARE))
    inputs, _, images = draw_inputs(mixture, generator)
    logits, maps = task.view.pooled(run.reference, images, None)
    half = len(inputs) // 2
    clean = slice(half, half + round(half * _CLEAN_SHARE)) if task.family is not None else slice(half, None)
    with smooth_activations(settings.smoothing), attacker.statistics(clean):
        new_logits, new_maps = task.view.pooled(attacker.model, inputs, logits.argmax(1), create_graph=True)
    losses = batch_losses(new_logits, new_maps, logits, maps, None, task, settings)
    loss = losses["L_s"].mean() + losses["L_p"].mean()
    loss = loss / (settings.alpha + settings.beta + 1)
    if attacker.attack is not None and attacker.attack.pruned:
        loss = losses["keep"].mean() + losses["move"].mean()
    parameters = [*attacker.model.parameters()]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [
        gradient if gradient is None else gradient * (weight != 0)  # what an attack set to zero stays there
        for weight, gradient in zip(parameters, gradients, strict=True)
    ]


def _make_optimiser(model: nn.Module, attack: Attack) -> torch.optim.Optimizer:
    if attack.adam:
        return torch.optim.Adam(model.parameters(), _ADAM_FACTOR * attack.rate)
    return torch.optim.SGD(model.parameters(), attack.rate, momentum=_MOMENTUM)


def _gradient_norm(gradients: Sequence[Tensor | None]) -> float:
    squares = [each.square().sum() for each in gradients if each is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
