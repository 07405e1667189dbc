"""An ownership claim, tested on a suspect model: whose key, read from where, on which images, in which words.

What is claimed (trigger, interpreters, grid, decoy) comes from the owner's signed licence where there is one, never
from a card that a thief may have written. Probe images are public or the verifier's own, never the claimant's: inputs
can be optimised to make any model look marked. The tests themselves are in `keyed_xai.ownership.tests`.

The p-values hold for a key, and a licence with its card, that were fixed before their holder saw the suspect. Whoever
tries a million keys on a model of somebody else's finds one with p = 1e-6: a judge wants the licence dated by a third
party, or a level that no search reaches. What a card may choose is bounded: its schema bounds grids and sizes, and
layers are those that recognition names.
"""

import hashlib
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keyed_xai.artifacts.card import Card, TriggerParameters, read_card
from keyed_xai.artifacts.documents import printable, read_limited
from keyed_xai.artifacts.folder import CARD_FILE, LICENSE_FILE
from keyed_xai.artifacts.license import License, digest, read_license
from keyed_xai.artifacts.opening import default_trigger, make_family
from keyed_xai.artifacts.versions import package_versions
from keyed_xai.data import ImageData, Request, list_images, load_images
from keyed_xai.data.decode import decode_images
from keyed_xai.data.images import rank
from keyed_xai.errors import ArtifactError, KeyFormatError, ModelError
from keyed_xai.keys import OwnerKey, PublicKey
from keyed_xai.limits import ImageSize
from keyed_xai.models import Classifier, InputSpec
from keyed_xai.models.loading import OWN_CODE
from keyed_xai.models.modes import plain_torch
from keyed_xai.ownership.black_box import BlackBox, view_black_box
from keyed_xai.ownership.evidence import choose_evidence, recognised_layers
from keyed_xai.ownership.reencodings import is_usual_normalisation
from keyed_xai.ownership.tests import OpeningEvidence, PatternEvidence, SignatureEvidence, counted_interpreters
from keyed_xai.ownership.verdict import DEFAULT_ALPHA, Verdict, verify_ownership
from keyed_xai.ownership.wording import WHY_NOT_COUNTED, describe_verdict
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency.pooled import make_view

SCHEMA = "keyed-xai/verify-report/v1"
DEFAULT_IMAGES = 64
_WEIGHTS = ("model.safetensors", "model.pt", "pytorch_model.bin")
_GIVEN_NOTHING_AWAY = (
    "Not tested: without the public pattern no outcome could show the claim, and whoever runs the model would have "
    "seen the trigger."
)
_LARGEST_PEM = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What an owner claims about a model.

    Attributes:
        key: The owner's; a public key alone allows the signature test only.
        trigger: Public parameters of the trigger; None takes what `protect` uses for images of the suspect's size.
        decoy: What unkeyed maps are claimed to show; only "signature" can be tested.
        interpreters: Interpreters whose maps are tested.
        grid: Rows and columns of the pooled maps; None takes the suspect's target layer's, at most 8 x 8.
        card: How models of this owner are run; None where nothing trustworthy says so.
        origin: Source of all this: "licence", "suspect" or "defaults".
        notes: What a judge should know about it, in sentences.
    """

    key: OwnerKey | PublicKey
    trigger: TriggerParameters | None = None
    decoy: str = "signature"
    interpreters: tuple[str, ...] = ("gradcam",)
    grid: tuple[int, int] | None = None
    card: Card | None = None
    origin: str = "defaults"
    notes: tuple[str, ...] = ()

    @property
    def public(self) -> PublicKey:
        """The public half of the key."""
        return self.key.public if isinstance(self.key, OwnerKey) else self.key


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Outcome of a claim's tests.

    Attributes:
        verdict: What they show.
        claim: What was tested.
        trigger: Public parameters of the trigger.
        grid: Rows and columns that maps were compared on.
        target_layer: Target layer of the suspect; empty of one that only answers.
        probe: Images the tests were made on.
        decoys: Random keys asked for; the opening test may have stopped earlier.
        seed: Seed of the random keys.
    """

    verdict: Verdict
    claim: Claim
    trigger: TriggerParameters
    grid: tuple[int, int]
    target_layer: str
    probe: ImageData
    decoys: int
    seed: int

    @property
    def sentence(self) -> str:
        """The outcome in plain words."""
        return describe_verdict(self.verdict, decoys=self.decoys)

    def to_json(self, model: str) -> dict[str, Any]:
        """Return a document of the schema "verify-report".

        Args:
            model: Names the suspect.
        """
        claim = self.claim
        return {
            "schema": SCHEMA,
            "verdict": "shown" if self.verdict.shown else "not shown",
            "finding": str(self.verdict.finding),
            "sentence": self.sentence,
            "model": printable(model)[-300:],
            "key_id": claim.public.key_id,
            "alpha": self.verdict.alpha,
            "counted": list(counted_interpreters(claim.interpreters)),
            "combined": {
                "log2_p": self.verdict.log2_p,
                "looks": self.verdict.looks,
                "reencoding": None if self.verdict.reencoding is None else str(self.verdict.reencoding),
                "constant_maps": dict(self.verdict.constant),
            },
            "opening": _opening_json(self.verdict.opening, tested=isinstance(claim.key, OwnerKey)),
            "signature": _signature_json(self.verdict.signature, claim.decoy),
            "probe": {
                "source": printable(self.probe.source),
                "images": len(self.probe),
                "digest": digest_pixels(self.probe),
            },
            "settings": {
                "claim_from": claim.origin,
                "trigger": self.trigger.to_json(),
                "decoy": claim.decoy,
                "interpreters": list(claim.interpreters),
                "grid": list(self.grid),
                "target_layer": self.target_layer,
                "decoys": self.decoys,
                "seed": self.seed,
                "notes": list(claim.notes),
            },
            "versions": package_versions(),
        }


@plain_torch()
def verify(
    suspect: Classifier | BlackBox,
    claim: Claim,
    probe: ImageData,
    *,
    alpha: float = DEFAULT_ALPHA,
    decoys: int = 999,
    search: bool = True,
    seed: int | None = None,
    progress: Progress = QUIET,
) -> Verification:
    """Return what the tests that a claim allows show about a suspect, on the suspect's device.

    VisualBackProp's evidence is reported and counts for nothing; the claim that comes back has a note of it. One that
    only answers is tested on those of the claimed maps that it returns.

    Args:
        suspect: The suspect, in any mode; it is tested in evaluation mode.
        claim: What is claimed.
        probe: Images at the suspect's input size, not from the claimant.
        alpha: Level, a probability.
        decoys: Random keys that the owner's is compared with, at most.
        search: Whether to look through exact re-encodings when the suspect as it stands does not show the pattern.
        seed: Seed of the random keys; by default from the operating system.
        progress: Hears of "trying random keys" and of "looking through re-encodings".

    Raises:
        ArtifactError: The claim's trigger cannot be made.
        ModelError: The suspect lacks a layer that the maps need, or returns none of the claimed maps.
        ValueError: There are no images or no decoys, or alpha is no probability.
    """
    seed = secrets.randbits(63) if seed is None else seed
    images, _ = probe.batch(np.arange(len(probe)))
    if isinstance(suspect, Classifier):
        layer, note = _claimed_layer(suspect, claim)
        claim = replace(claim, notes=(*claim.notes, *note, *_own_normalisation(suspect, claim)))
        images, view = images.to(suspect.mean), make_view(suspect, claim.interpreters, claim.grid, target_layer=layer)
    else:
        layer, view = "", view_black_box(suspect, claim.interpreters, claim.grid)
    claim = _narrow(claim, view.interpreters)
    trigger = claim.trigger or default_trigger(ImageSize(*images.shape[1:]))
    verdict = verify_ownership(
        suspect,
        images,
        view,
        claim.key,
        make_family(trigger),
        alpha=alpha,
        decoys=decoys,
        test_signature=claim.decoy == "signature",
        search=search,
        may_count=not isinstance(suspect, Classifier) or suspect.source in OWN_CODE,
        generator=torch.Generator().manual_seed(seed),
        progress=progress,
    )
    claim = replace(claim, notes=(*claim.notes, *_uncounted(claim.interpreters)))
    return Verification(
        verdict=verdict,
        claim=claim,
        trigger=trigger,
        grid=view.grid,
        target_layer=layer,
        probe=probe,
        decoys=decoys,
        seed=seed,
    )


def read_claim(
    suspect: Path | Card | None, *, key: OwnerKey | PublicKey | None = None, license_path: Path | None = None
) -> Claim:
    """Return the claim that a key and a licence make on a suspect.

    With a licence its trigger, decoy, interpreters and grid count, and the card beside it where the licence covers that
    card. Without one, the suspect's own card says what is tested, and a note says so; without either, the defaults do.

    Args:
        suspect: The folder of a protected model, or a file of weights; of one that only answers, the card that it
            shows, if any.
        key: The claimant's; the licence's public key if absent.
        license_path: The owner's signed licence.

    Raises:
        ArtifactError: The licence does not hold, names another key, or commits to another trigger.
        KeyFormatError: There is neither a key nor a licence.
    """
    path = suspect if isinstance(suspect, Path) else None
    shown = suspect if isinstance(suspect, Card) else None
    suspect_card, notes = _read_suspect_card(path) if path is not None else (shown, [])
    if license_path is not None:
        claim = _claim_of_license(license_path, key)
        if claim.card is None and suspect_card is not None and path is not None:
            # The thief's layers are not taken over: they could point away from the mark.
            claim = replace(claim, card=replace(suspect_card, target_layer="", taps=()))
            notes.append("No card that the licence vouches for was found beside it: the suspect was run at the size "
                         "and normalisation of its own card.")  # fmt: skip
    elif key is None:
        raise KeyFormatError("Whose claim? Give the owner's private key, public key or licence.")
    elif suspect_card is not None:
        claim = _claim_of_card(key, suspect_card)
    else:
        claim = Claim(key=key, notes=("No licence was given: trigger, interpreters and grid are the defaults.",))
    if path is None:
        return replace(claim, notes=(*claim.notes, "The suspect was asked from outside: nothing inside it was seen."))
    if claim.card is None:
        notes.append("No card says how the suspect is run: its size and normalisation are the architecture's defaults, "
                     "unless they were given.")  # fmt: skip
    return replace(claim, notes=(*claim.notes, *notes, *_foreign_license(path, claim.public)))


def find_weights(suspect: Path) -> Path:
    """Return the file with a suspect's weights; nothing else in its folder is trusted.

    Raises:
        ModelError: The folder holds none.
    """
    if not suspect.is_dir():
        return suspect
    card, _ = _read_suspect_card(suspect)
    names = ((card.weights_file,) if card is not None else ()) + _WEIGHTS
    found = next((suspect / name for name in names if (suspect / name).is_file()), None)
    if found is None:
        raise ModelError(f"{printable(str(suspect))} holds no weights ({', '.join(_WEIGHTS)}).")
    return found


def read_public_key(path: Path) -> PublicKey:
    """Return the public key in a PEM file.

    Raises:
        ArtifactError: The file cannot be read.
        KeyFormatError: It holds no Ed25519 public key.
    """
    try:
        return PublicKey.from_pem(read_limited(path, _LARGEST_PEM))
    except KeyFormatError as error:
        raise KeyFormatError(f"{printable(str(path))}: {error}") from error


def load_probe(
    spec: InputSpec,
    *,
    folder: Path | None = None,
    count: int = DEFAULT_IMAGES,
    follow_links: bool = False,
) -> ImageData:
    """Return images to test on: some of a folder's, or of the built-in set, which no key has a part in.

    Args:
        spec: The suspect's input.
        folder: The verifier's images, at any depth; chosen by a hash of their relative names.
        count: How many, at most.
        follow_links: Read images and folders that are links out of `folder`.

    Raises:
        DataError: The folder has no image, or most of them are broken.
    """
    if folder is None:
        return load_images("builtin", spec, split="held-out", limit=count)
    request = Request(size=spec, split="held-out", limit=count, follow_links=follow_links)
    names = [path.relative_to(folder).as_posix() for path in list_images(folder, follow_links=follow_links)]
    chosen = sorted(names, key=lambda name: rank(0, name))[:count]
    images, _, skipped = decode_images(folder, chosen, request)
    return ImageData(
        images=images, labels=None, classes=(), source=f"folder {folder.resolve().name}"[:300], skipped=tuple(skipped)
    )


def digest_pixels(data: ImageData) -> str:
    """Return the SHA-256 of all pixels, 8 bits each, in the order [n, c, h, w]."""
    return f"sha256:{hashlib.sha256(np.ascontiguousarray(data.images).data).hexdigest()}"


def _claimed_layer(suspect: Classifier, claim: Claim) -> tuple[str, list[str]]:
    """Return the layer that is tested: the suspect's, unless a claim's card names one that recognition does not.

    Whoever may name any layer of a network has a try with each. Where no card says anything, it is the layer that
    `protect` would have taken.
    """
    if claim.card is None or not claim.card.target_layer:
        return choose_evidence(suspect, claim.interpreters, claim.grid).view.map_layers.target_layer, []
    if suspect.target_layer.removeprefix("network.") != claim.card.target_layer.removeprefix("network."):
        return suspect.target_layer, []
    known = recognised_layers(suspect)
    if not known or suspect.target_layer in known:
        return suspect.target_layer, []
    layers = ", ".join(name.removeprefix("network.") for name in known)
    note = (f"The claim's card names the layer {printable(claim.card.target_layer)}, which a claim on "
            f"{suspect.architecture} cannot rest on ({layers}): the first of these was tested.")  # fmt: skip
    return known[0], [note[:500]]


def _own_normalisation(suspect: Classifier, claim: Claim) -> list[str]:
    """Return a note where the suspect is run by numbers of the claim's own."""
    spec = suspect.input
    used = (spec.mean, spec.std)
    if claim.card is None or used != (claim.card.mean, claim.card.std) or is_usual_normalisation(spec):
        return []
    return ["The claim's card normalises pixels by numbers of its own. Whoever may choose them after seeing the model "
            "can fit them to his pattern: have the licence dated by a third party, or give --mean and "
            "--std."]  # fmt: skip


def _narrow(claim: Claim, tested: tuple[str, ...]) -> Claim:
    """Return a claim about the maps that can be tested, with a note of those that cannot."""
    missing = [name for name in claim.interpreters if name not in tested]
    if not missing:
        return claim
    note = f"The suspect returns no maps of {', '.join(missing)}, which the claim names too: the others were tested."
    return replace(claim, interpreters=tested, notes=(*claim.notes, note))


def _uncounted(interpreters: tuple[str, ...]) -> list[str]:
    """Return a note where some of a claim's interpreters count for nothing."""
    if counted_interpreters(interpreters) == interpreters:
        return []
    return [f"VisualBackProp's evidence is reported and does not count: {WHY_NOT_COUNTED}."]


def _opening_json(evidence: OpeningEvidence | None, *, tested: bool) -> dict[str, Any]:
    if evidence is None:
        return {
            "p_value": 1.0,
            "decoys": 0,
            "statistic": None,
            "largest_decoy": None,
            "reached": 0,
            "explanation": _GIVEN_NOTHING_AWAY if tested else "Not tested: the secret trigger needs the private key.",
        }
    found = evidence.to_json()
    figures: dict[str, Any] = {name: found[name] for name in ("p_value", "decoys", "statistic", "largest_decoy")}
    figures["reached"] = evidence.reached
    if figures["statistic"] is None:
        figures["explanation"] = "The suspect's maps are not finite numbers, which is no evidence."
    return figures


def _signature_json(evidence: SignatureEvidence | None, decoy: str) -> dict[str, Any]:
    if evidence is None:
        return {
            "p_value": 1.0,
            "log2_p": 0.0,
            "cells": 0,
            "overlap": 0,
            "possible": 0,
            "interpreters": {},
            "explanation": f"Not tested: the claim's decoy is {decoy!r}, which holds no pattern of the owner's key.",
        }
    each = {name: _pattern_json(one) for name, one in evidence.interpreters.items()}
    return {**_pattern_json(evidence.combined), "interpreters": each}


def _pattern_json(evidence: PatternEvidence) -> dict[str, Any]:
    return {
        "p_value": min(1.0, evidence.p_value),
        "log2_p": min(0.0, evidence.log2_p),
        "cells": evidence.cells,
        "overlap": evidence.overlap,
        "possible": evidence.possible,
    }


def _claim_of_license(path: Path, key: OwnerKey | PublicKey | None) -> Claim:
    public = key.public if isinstance(key, OwnerKey) else key
    license_ = read_license(path, expected=public)
    family, version = license_.trigger.family, license_.trigger.version
    if isinstance(key, OwnerKey) and key.commitment(family, version=version) != license_.commitment:
        raise ArtifactError(f"{printable(str(path))} commits to another trigger than the key's. Give the licence that "
                            "`keyed-xai protect` wrote with this key.")  # fmt: skip
    return Claim(
        key=license_.public_key if key is None else key,
        trigger=license_.trigger,
        decoy=license_.decoy,
        interpreters=license_.interpreters,
        grid=license_.grid,
        card=_vouched_card(path, license_),
        origin="licence",
    )


def _vouched_card(path: Path, license_: License) -> Card | None:
    """Return the card beside a licence, if it is the one that was signed."""
    beside = path.parent / CARD_FILE
    if not beside.is_file() or license_.subjects.get(CARD_FILE) != digest(beside):
        return None
    return read_card(beside)


def _claim_of_card(key: OwnerKey | PublicKey, card: Card) -> Claim:
    note = ("No licence was given: what is tested comes from the suspect's own card, which its holder may have "
            "written. Give --license.")  # fmt: skip
    return Claim(
        key=key,
        trigger=card.trigger,
        decoy=card.decoy,
        interpreters=card.interpreters,
        grid=card.grid,
        card=card,
        origin="suspect",
        notes=(note,),
    )


def _read_suspect_card(suspect: Path) -> tuple[Card | None, list[str]]:
    path = suspect / CARD_FILE
    if not path.is_file():
        return None, []
    try:
        return read_card(path), []
    except ArtifactError:
        return None, ["The suspect's card is malformed and was left aside."]


def _foreign_license(suspect: Path, public: PublicKey) -> list[str]:
    """Return a note where the suspect carries somebody else's licence, or a broken one."""
    path = suspect / LICENSE_FILE
    if not path.is_file():
        return []
    try:
        found = read_license(path).public_key
    except ArtifactError:
        return ["The suspect carries a licence that does not hold."]
    if found.raw == public.raw:
        return []
    return [f"The suspect carries a licence of another key ({found.key_id[:16]}); anybody can sign one."]
