"""From an owner key to its trigger, on arrays and on torch's images alike."""

from typing import Protocol, TypeVar, runtime_checkable

from keyed_xai.keys import ByteStream, OwnerKey

_Trigger = TypeVar("_Trigger", covariant=True)


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
