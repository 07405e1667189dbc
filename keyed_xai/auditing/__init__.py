"""Audit a model: which threats are run against it, with what strength, and the report of what they found."""

from keyed_xai.auditing.running import Audit, AuditSettings, audit
from keyed_xai.auditing.suspects import Suspect, open_suspect

__all__ = ["Audit", "AuditSettings", "Suspect", "audit", "open_suspect"]
