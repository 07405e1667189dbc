"""Prove whose a model is: exact tests of what a key does to its maps, of files or of a server, in plain words."""

from keyed_xai.ownership.verdict import Verdict, verify_ownership
from keyed_xai.ownership.verifying import Claim, Verification, load_probe, read_claim, verify

__all__ = ["Claim", "Verdict", "Verification", "load_probe", "read_claim", "verify", "verify_ownership"]
