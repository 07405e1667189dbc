"""What every trigger and every trigger family can do."""

from typing import Protocol, runtime_checkable

import torch

from keyed_xai.keys import ByteStream
from keyed_xai.tensors import Images


@runtime_checkable
class Trigger(Protocol):
    """A change made to images: differentiable, batched, on the images' own device and dtype."""

    def apply(self, images: Images) -> Images:
        """Return the triggered images, in [0, 1]."""


@runtime_checkable
class NearbyTrigger(Trigger, Protocol):
    """A trigger with neighbours that must stay closed: near keys."""

    def perturbed(self, generator: torch.Generator) -> Trigger:
        """Return a randomly chosen neighbour."""

    def shifted(self, rows: int, columns: int) -> Trigger:
        """Return this trigger moved by some pixels."""

    def scaled(self, factor: float) -> Trigger:
        """Return this trigger at another strength."""


@runtime_checkable
class TriggerFamily(Protocol):
    """Derives the trigger of a key and draws those of other keys."""

    @property
    def name(self) -> str:
        """The name in TRIGGERS, which enters the derivation of the seed."""

    @property
    def version(self) -> int:
        """Version of its triggers, which enters it too."""

    @property
    def key_bits(self) -> int:
        """Effective key entropy, bits."""

    def derive(self, stream: ByteStream) -> NearbyTrigger:
        """Return the trigger of the key whose stream this is."""

    def draw(self, count: int, generator: torch.Generator) -> Trigger:
        """Return triggers of fresh random keys, one for each image of a batch of `count`."""
