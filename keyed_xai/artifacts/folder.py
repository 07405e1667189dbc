"""A protected model on disk: weights, card, signed licence and report in one folder, `<name>.keyed/`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from keyed_xai.artifacts.card import Card, read_card
from keyed_xai.artifacts.documents import printable
from keyed_xai.artifacts.license import License, SubjectState, check_subjects, read_license
from keyed_xai.errors import ArtifactError
from keyed_xai.keys import PublicKey

CARD_FILE = "card.json"
LICENSE_FILE = "license.json"
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class ProtectedModel:
    """A protected model's folder, read and checked.

    Attributes:
        folder: The folder that it was read from.
        card: How to run it.
        license: Who signed it, and the digests of its files.
    """

    folder: Path
    card: Card
    license: License

    @property
    def weights(self) -> Path:
        """The file with the weights."""
        return self.folder / self.card.weights_file


def read_model_folder(folder: Path, *, expected: PublicKey | None = None) -> ProtectedModel:
    """Return the protected model in a folder, once its licence's signature holds and fits the card.

    Args:
        folder: Folder of a protected model.
        expected: The owner who must have signed.

    Raises:
        ArtifactError: It is no such folder, or anything in it is malformed, missing or not as signed.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{printable(str(folder))} is not the folder of a protected model. "
                            "Make one with `keyed-xai protect`.")  # fmt: skip
    card = read_card(folder / CARD_FILE)
    model = ProtectedModel(folder, card, read_license(folder / LICENSE_FILE, expected=expected))
    problems = describe_contradictions(model.card, model.license)
    problems = problems or describe_changes(check_subjects(model.license, folder))
    if problems:
        raise ArtifactError(f"{printable(str(folder))}: {' '.join(problems)}")
    return model


def describe_contradictions(card: Card, license_: License) -> list[str]:
    """Return a sentence for each way in which a card is not the one the licence was signed for."""
    needed = {CARD_FILE, card.weights_file}
    problems = [f"The licence does not cover {name}." for name in sorted(needed - license_.subjects.keys())]
    signed = (license_.trigger, license_.decoy, license_.interpreters, license_.grid)
    if signed != (card.trigger, card.decoy, card.interpreters, card.grid):
        problems.append("The card and the licence name different triggers, decoys, interpreters or grids.")
    return problems


def describe_changes(subjects: Iterable[tuple[str, SubjectState]]) -> list[str]:
    """Return a sentence for each file that is not as the licence says, given what `check_subjects` found."""
    return [
        f"{name} is missing." if state == "missing" else f"{name} was changed after the licence was signed."
        for name, state in subjects
        if state != "ok"
    ]
