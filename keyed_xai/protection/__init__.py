"""Protect a model: close its maps to everybody without a key, measure what came of it, and write it down."""

from keyed_xai.protection.protecting import Protection, ProtectSettings, protect, write_protection

__all__ = ["ProtectSettings", "Protection", "protect", "write_protection"]
