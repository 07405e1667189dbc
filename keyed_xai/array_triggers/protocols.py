"""What every trigger and every trigger family on arrays can do."""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from keyed_xai.keys import ByteStream


@runtime_checkable
class ArrayTrigger(Protocol):
    """A change made to images."""

    def apply(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the triggered images, in [0, 1]."""


@runtime_checkable
class ArrayTriggerFamily(Protocol):
    """Derives the trigger of a key."""

    @property
    def name(self) -> str:
        """The name in ARRAY_TRIGGERS, which enters the derivation of the seed."""

    @property
    def version(self) -> int:
        """Version of its triggers, which enters it too."""

    def derive(self, stream: ByteStream) -> ArrayTrigger:
        """Return the trigger of the key whose stream this is."""
