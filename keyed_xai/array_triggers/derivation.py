"""From public parameters to a family, and from an owner key to its trigger, on arrays and on torch's images alike."""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from keyed_xai.keys import ByteStream, OwnerKey

_Trigger = TypeVar("_Trigger", covariant=True)
_Made = TypeVar("_Made", covariant=True)


@runtime_checkable
class MakeFamily(Protocol[_Made]):
    """Makes a family of public parameters."""

    def __call__(self, amplitude: float, tile: int, version: int = 1) -> _Made:
        """Return the family; in version 1 where none is named.

        Args:
            amplitude: Largest change of a pixel, 1/255; for `spread` only.
            tile: Side of the repeated tile, pixels; likewise.
            version: Version of the triggers.

        Raises:
            ValueError: A parameter is outside its range, or there is no such version.
        """


@runtime_checkable
class _Family(Protocol[_Trigger]):
    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    def derive(self, stream: ByteStream) -> _Trigger: ...


def derive_trigger(key: OwnerKey, family: _Family[_Trigger]) -> _Trigger:
    """Return the trigger that a family has for an owner key; it is a secret like the key."""
    return family.derive(ByteStream(key.derive_seed(family.name, version=family.version)))


def without_parameters(make: Callable[[], _Made]) -> MakeFamily[_Made]:
    """Return what makes a family that has no public parameters, and has had one version."""

    def make_family(amplitude: float, tile: int, version: int = 1) -> _Made:  # noqa: ARG001 - it has neither
        if version != 1:
            raise ValueError(f"version: expected 1, got {version}")
        return make()

    return make_family
