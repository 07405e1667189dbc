"""Audit a model: which threats are run against it, with what strength, and the report of what they found."""

from typing import TYPE_CHECKING

from keyed_xai import load_on_use

if TYPE_CHECKING:
    from keyed_xai.auditing.running import Audit, AuditSettings, audit
    from keyed_xai.auditing.suspects import Suspect, open_suspect

__all__ = ["Audit", "AuditSettings", "Suspect", "audit", "open_suspect"]

__getattr__, __dir__ = load_on_use(
    __name__,
    {
        "Audit": "keyed_xai.auditing.running",
        "AuditSettings": "keyed_xai.auditing.running",
        "Suspect": "keyed_xai.auditing.suspects",
        "audit": "keyed_xai.auditing.running",
        "open_suspect": "keyed_xai.auditing.suspects",
    },
)
