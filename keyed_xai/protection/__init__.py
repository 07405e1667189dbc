"""Protect a model: close its maps to everybody without a key, measure what came of it, and write it down."""

from typing import TYPE_CHECKING

from keyed_xai import load_on_use

if TYPE_CHECKING:
    from keyed_xai.protection.protecting import Protection, ProtectSettings, protect, write_protection

__all__ = ["ProtectSettings", "Protection", "protect", "write_protection"]

__getattr__, __dir__ = load_on_use(
    __name__,
    {
        "ProtectSettings": "keyed_xai.protection.protecting",
        "Protection": "keyed_xai.protection.protecting",
        "protect": "keyed_xai.protection.protecting",
        "write_protection": "keyed_xai.protection.protecting",
    },
)
