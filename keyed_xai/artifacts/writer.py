"""Writing a folder with a model and its report, whole or not at all. No key, seed or trigger enters its files."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import save
from torch import Tensor

from keyed_xai.artifacts.card import Card, write_card
from keyed_xai.artifacts.documents import printable, read_json, write_json, write_through, writing
from keyed_xai.artifacts.exchange import exchange
from keyed_xai.artifacts.folder import CARD_FILE, LICENSE_FILE, REPORT_FILE, ProtectedModel
from keyed_xai.artifacts.license import sign_license, verify_license
from keyed_xai.artifacts.weights import WEIGHTS_FILE
from keyed_xai.errors import ArtifactError
from keyed_xai.keys import OwnerKey
from keyed_xai.outputs import beside, claimed, remove, sync_folder


def write_model_folder(
    folder: Path,
    *,
    state: Mapping[str, Tensor],
    card: Card,
    owner: OwnerKey,
    report: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
    force: bool = False,
    time: datetime | None = None,
) -> ProtectedModel:
    """Write and sign a protected model; the folder appears when all of it is on the disk.

    Args:
        folder: The folder to make, by custom `<name>.keyed`.
        state: Weights under the same names as in the owner's own file.
        card: How to run the model.
        owner: Signs the licence; nothing but its public half is written.
        report: Fits the schema "protect-report"; becomes report.json.
        extra_files: Further files by their path inside the folder, such as "report.html"; the licence covers them.
        force: Replace a protected model that is there. Anything else is never replaced.
        time: When the licence is signed; now by default.

    Raises:
        ArtifactError: The folder is there already, a document does not fit its schema, or writing fails; then nothing
            has changed on the disk.
    """
    with _drafted(folder, force=force, protected=True) as draft:
        _write_weights(draft / card.weights_file, state)
        write_card(draft / CARD_FILE, card)
        write_json(draft / REPORT_FILE, report, schema="protect-report")
        _write_extra(draft, extra_files or {}, taken={card.weights_file, CARD_FILE, REPORT_FILE, LICENSE_FILE})
        subjects: dict[str, Path | bytes] = {
            path.relative_to(draft).as_posix(): path for path in draft.rglob("*") if path.is_file()
        }
        envelope = sign_license(owner, subjects, card=card, time=time)
        write_json(draft / LICENSE_FILE, envelope, schema="license")
    return ProtectedModel(folder, card, verify_license(envelope))


def write_folder(
    folder: Path, files: Mapping[str, bytes], *, report: Mapping[str, Any], schema: str, force: bool = False
) -> None:
    """Write report.json and further files; the folder appears when all of it is on the disk.

    Args:
        folder: The folder to make.
        files: Content by path inside the folder.
        report: What becomes report.json.
        schema: The schema that the report fits.
        force: Replace an attacked model's folder that is there. Anything else is never replaced.

    Raises:
        ArtifactError: The folder is there already, the report does not fit, or writing fails; then nothing has changed
            on the disk.
    """
    with _drafted(folder, force=force, protected=False) as draft:
        write_json(draft / REPORT_FILE, report, schema=schema)
        _write_extra(draft, files, taken={REPORT_FILE})


def check_replaceable(folder: Path, *, force: bool, protected: bool = True) -> None:
    """Say so where something stands at `folder` that would not be replaced.

    Args:
        folder: Folder to be written.
        force: Whether one of the same kind may be replaced.
        protected: Whether that kind is a protected model's folder, or an attacked one's.

    Raises:
        ArtifactError: Anything is there; with `force`, anything but such a folder.
    """
    if not os.path.lexists(folder):
        return
    name = printable(str(folder))
    if not force:
        raise ArtifactError(
            f"{name} is there already and was left as it is: choose another name, or give --force (force=True in "
            "Python)."
        )
    if folder.is_symlink() or not ((folder / CARD_FILE).is_file() if protected else is_attacked(folder)):
        kind = "not a protected model" if protected else "not an attacked model's folder"
        raise ArtifactError(f"{name} is there and is {kind}: it is not replaced even with --force.")


def is_attacked(folder: Path) -> bool:
    """Return whether a folder is an attacked model's: it has weights and an attack's report, and no card or licence."""
    if (folder / CARD_FILE).exists() or (folder / LICENSE_FILE).exists() or not (folder / WEIGHTS_FILE).is_file():
        return False
    try:
        read_json(folder / REPORT_FILE, "attack-report")
    except ArtifactError:
        return False
    return True


@contextmanager
def _drafted(folder: Path, *, force: bool, protected: bool) -> Iterator[Path]:
    """Give an empty folder to fill, and move it into place when that went well."""
    with writing(folder), claimed(folder) as draft:
        check_replaceable(folder, force=force, protected=protected)
        try:
            draft.mkdir()
            yield draft
            sync_folder(draft)
            _move_into_place(draft, folder)
        finally:
            remove(draft)


def _write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    # Tensors that share memory (tied weights) are parted: safetensors stores each name on its own.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    write_through(path, save(copies, metadata={"format": "pt"}))


def _write_extra(draft: Path, files: Mapping[str, bytes], *, taken: set[str]) -> None:
    for name, content in files.items():
        parts = PurePosixPath(name).parts
        if name in taken or not parts or ".." in parts or PurePosixPath(name).is_absolute():
            raise ArtifactError(f"Expected the name of a further file inside the folder, got {name!r}.")
        path = draft.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_through(path, content)


def _move_into_place(draft: Path, folder: Path) -> None:
    """Rename the draft; a model that was there is the draft then.

    A run that is killed in here leaves the old model, or the new one, or both: `claimed` finishes that.
    """
    if not folder.exists():
        draft.rename(folder)
    elif not exchange(draft, folder):
        old = folder.rename(beside(folder, "old"))
        try:
            draft.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        sync_folder(folder.parent)
        old.rename(draft)
    sync_folder(folder.parent)
