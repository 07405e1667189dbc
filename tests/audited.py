"""The tiny models of `threatened` and `poisoned` as an auditor finds them."""

from functools import cache

import numpy as np
import torch

from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.auditing.entries import Examination
from keyed_xai.auditing.running import AuditSettings
from keyed_xai.auditing.subject import Subject
from keyed_xai.auditing.suspects import Suspect
from keyed_xai.data import ImageData
from keyed_xai.threats.detection.activation_clustering import ClusteringSettings
from keyed_xai.threats.detection.controls import poison
from keyed_xai.triggers import derive_trigger
from tests.poisoned import HELD_OUT, SETTINGS, TRAIN, control, training_data
from tests.threatened import FAMILY, GRID, OWNER, evidence, make_blobs, protected, reference

PARAMETERS = TriggerParameters("spread", 24.0, 24)
TRIGGER = derive_trigger(OWNER, FAMILY)
SECRETS = [
    secret
    for raw in (bytes(range(32)), OWNER.derive_seed("spread"))
    for secret in (raw.hex(), repr(list(raw)), repr(raw))
]


def make_image_data(count, seed, labelled=True):
    blobs = make_blobs(count, seed)
    images = (blobs.images * 255).round().to(torch.uint8).numpy()
    names = blobs.classes if labelled else ()
    return ImageData(images=images, labels=blobs.labels if labelled else None, classes=names, source=f"blobs {seed}")


ATTACKERS, OTHERS = make_image_data(64, 5), make_image_data(48, 3)


def keyed_subject(**changes):
    """The owner's view of the protected model."""
    fields = {
        "classifier": protected(),
        "view": evidence().view,
        "data": ATTACKERS,
        "held_out": OTHERS,
        "images": evidence().images,
        "labels": evidence().labels,
        "reference": reference(),
        "evidence": evidence(decoys=99),
        "trigger": TRIGGER,
        "keyed": True,
        "inverted": True,
    }
    return Subject(**(fields | changes))


def public_subject(**changes):
    """The same model with its trigger published, so that it is an inverted attack."""
    return keyed_subject(**({"evidence": None, "keyed": False} | changes))


@cache
def control_subject(attack):
    """A plain backdoor, or for None a clean network, as defences see it."""
    backdoor = poison(TRAIN) if attack is None else training_data(attack)
    images, labels = HELD_OUT.batch(np.arange(len(HELD_OUT)))
    return Subject(
        classifier=control(attack).model,
        view=evidence().view,
        data=TRAIN,
        held_out=HELD_OUT,
        images=images,
        labels=labels,
        trigger=backdoor.trigger,
        backdoor=backdoor,
        fitted=None if attack is None else backdoor,
    )


def keyed_suspect(**changes):
    fields = {
        "name": "blobs.keyed",
        "kind": "keyed",
        "classifier": protected(),
        "grid": GRID,
        "inverted": True,
        "signature": True,
        "key": OWNER,
        "parameters": PARAMETERS,
        "trigger": TRIGGER,
        "reference": reference(),
    }
    return Suspect(**(fields | changes))


def backdoored_suspect():
    """A plain backdoor that an auditor takes for an attack on explanations."""
    return Suspect(
        name="badnets", kind="attacked", classifier=control("badnets").model, trigger=control_subject("badnets").trigger
    )


def quick(*against, **changes):
    fields = {"against": against, "control": SETTINGS, "decoys": 9, "held_out_images": 32}
    return AuditSettings(**(fields | changes))


def example(examine, **fields):
    """A check of one's own."""
    facts = {"title": "Mine", "threat": "T17", "group": "checks", "settings": ClusteringSettings()}
    return Examination(**(facts | {"words": lambda s: f"{s.dimensions} components", "examine": examine} | fields))
