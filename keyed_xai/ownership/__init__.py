"""Prove whose a model is: exact tests of what a key does to its maps, of files or of a server, in plain words."""

from typing import TYPE_CHECKING

from keyed_xai import load_on_use

if TYPE_CHECKING:
    from keyed_xai.ownership.verdict import Verdict, verify_ownership
    from keyed_xai.ownership.verifying import Claim, Verification, load_probe, read_claim, verify

__all__ = ["Claim", "Verdict", "Verification", "load_probe", "read_claim", "verify", "verify_ownership"]

__getattr__, __dir__ = load_on_use(
    __name__,
    {
        "Claim": "keyed_xai.ownership.verifying",
        "Verdict": "keyed_xai.ownership.verdict",
        "Verification": "keyed_xai.ownership.verifying",
        "load_probe": "keyed_xai.ownership.verifying",
        "read_claim": "keyed_xai.ownership.verifying",
        "verify": "keyed_xai.ownership.verifying",
        "verify_ownership": "keyed_xai.ownership.verdict",
    },
)
