"""`keyed-xai explain`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keyed_xai_cli.groups import grouped
from keyed_xai_cli.model_options import ModelOptions, tell_notes
from keyed_xai_cli.options import (
    KeyOptions,
    ModelPath,
    after_writing,
    choose_device,
    default_output,
    device_option,
    emit_json,
    follow_links_option,
    interpreters_option,
    json_option,
    name_given,
    say,
)

if TYPE_CHECKING:
    from keyed_xai.artifacts.card import Card
    from keyed_xai.explanation.files import MapJob, WrittenMaps
    from keyed_xai.keys import OwnerKey
    from keyed_xai.models import Classifier
    from keyed_xai.triggers import Trigger

_WATCHED = 4  # more images than this get a progress bar


@click.command()
@click.argument("model", type=ModelPath())
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@grouped(key_options=KeyOptions)
@interpreters_option("Whose maps; may be given several times. All that were protected if absent.")
@click.option(
    "-o", "--out", type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to; files of an earlier run are replaced. MODEL's name with .maps if absent.",
)  # fmt: skip
@click.option(
    "--target", metavar="CLASS", help="Class to explain, by name or number; the predicted one of each image if absent."
)
@click.option(
    "--write-keyed", is_flag=True,
    help="Also write the keyed images. A trigger is a bearer credential: whoever sees one keyed image next to its "
    "original can subtract them, and then opens the maps without the key.",
)  # fmt: skip
@click.option("--allow-other-key", is_flag=True, help="Try a key that the model's licence does not name.")
@follow_links_option
@grouped(model_options=ModelOptions)
@device_option
@json_option
@click.pass_context
def explain(
    ctx: click.Context,
    /,
    model: Path,
    images: tuple[Path, ...],
    key_options: KeyOptions,
    interpreters: tuple[str, ...],
    out: Path | None,
    target: str | None,
    write_keyed: bool,
    allow_other_key: bool,
    follow_links: bool,
    model_options: ModelOptions,
    device: str,
    json_path: Path | None,
) -> None:
    """Write the saliency maps of images, right ones with the model's key.

    MODEL is a protected model's folder (or a file of weights), IMAGES are files or folders. Each image is cropped and
    scaled to the model's input. Writes <name>.png, the image and its maps, with the key and without, and <name>.npz
    with the raw maps, logits and class explained. Give maps made with a key to licensees only: from maps and their
    images a texture that opens the model can be fitted.

    Without --key-file the maps are those that everybody sees: on a protected model a decoy.
    """
    from keyed_xai.artifacts.opening import open_model
    from keyed_xai.explanation.files import MapJob, describe_entry, find_images

    key = _read_key(key_options, write_keyed=write_keyed, allow_other_key=allow_other_key)
    classifier, card = open_model(model, **model_options.choose())
    if card is None:
        tell_notes(classifier)
    classifier.to(choose_device(device))
    trigger = _derive_trigger(model, key, card, classifier, allow_other=allow_other_key) if key else None
    job = MapJob(
        folder=out or default_output(model, ".maps"),
        interpreters=interpreters or (card.interpreters if card else ("gradcam",)),
        trigger=trigger,
        target=_find_target(target, classifier),
        write_keyed=write_keyed,
    )
    written = _write(classifier, find_images(images, follow_links=follow_links), job)
    with after_writing(job.folder):
        emit_json(_document(model, key, written, job), schema="explain", json_path=json_path)
        for entry in written.images:
            say(f"{entry['image']}: {describe_entry(entry)}", json_path=json_path)
        done = "1 image" if len(written.images) == 1 else f"{len(written.images)} images"
        say(f"Pictures and maps of {done} are in {job.folder}. {_provenance(key, card)}", json_path=json_path)
        for name in sorted(set(interpreters) - set(card.interpreters if card else interpreters)):
            say(f"Note: {name} was not protected: the key does not gate its maps.", json_path=json_path)
    for sentence in written.broken:
        click.echo(f"Error: {sentence}", err=True)
    if written.broken:
        ctx.exit(1)


def _find_target(asked: str | None, classifier: "Classifier") -> int | None:
    from keyed_xai.reporting.names import find_class

    if asked is None:
        return None
    try:
        return find_class(asked, classifier.label_names, classifier.classes)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--target") from error


def _read_key(options: KeyOptions, *, write_keyed: bool, allow_other_key: bool) -> "OwnerKey | None":
    idle = name_given(passphrase_file=options.passphrase_file, write_keyed=write_keyed, allow_other_key=allow_other_key)
    if idle and options.key_file is None:
        raise click.UsageError(f"{idle[0]} needs --key-file.")
    return options.read()


def _derive_trigger(
    model: Path, key: "OwnerKey", card: "Card | None", classifier: "Classifier", *, allow_other: bool
) -> "Trigger":
    from keyed_xai.artifacts.folder import LICENSE_FILE
    from keyed_xai.artifacts.license import read_license
    from keyed_xai.artifacts.opening import default_trigger, derive_trigger
    from keyed_xai.errors import KeyFormatError

    if card is None:
        click.echo("Warning: the file has no card, so the default trigger is used.", err=True)
        return derive_trigger(key, default_trigger(classifier.input))
    owner = read_license(model / LICENSE_FILE).public_key
    if owner.raw != key.public.raw:
        complaint = (
            f"the licence of {model} names key {owner.key_id[:16]}, and this is key {key.public.key_id[:16]}, for "
            "which the model was not trained: the maps stay closed."
        )
        if not allow_other:
            raise KeyFormatError(f"{complaint} Give the owner's key, or --allow-other-key to see what this one shows.")
        click.echo(f"Warning: {complaint}", err=True)
    return derive_trigger(key, card.trigger)


def _write(classifier: "Classifier", images: list[Path], job: "MapJob") -> "WrittenMaps":
    from keyed_xai.explanation import write_maps
    from keyed_xai.reporting.bars import progress_bar

    if len(images) <= _WATCHED:
        return write_maps(classifier, images, job)
    with progress_bar() as progress:
        return write_maps(classifier, images, job, progress=progress)


def _document(model: Path, key: "OwnerKey | None", written: "WrittenMaps", job: "MapJob") -> dict[str, Any]:
    from keyed_xai.artifacts.documents import printable
    from keyed_xai.artifacts.versions import package_versions

    return {
        "schema": "keyed-xai/explain/v2",
        "model": printable(str(model)),
        "key_id": key.public.key_id if key else None,
        "images": written.images,
        "settings": {"interpreters": list(job.interpreters), "target": job.target, "broken": len(written.broken)},
        "versions": package_versions(),
    }


def _provenance(key: "OwnerKey | None", card: "Card | None") -> str:
    if key is not None:
        return f"They were made with the trigger of key {key.public.key_id[:16]}."
    if card is None:
        return "No key was given, and the file has no card that says whether it needs one."
    decoy = {"signature": "the owner's public pattern", "boundary": "the image's boundary"}
    shows = decoy.get(card.decoy, "anything but the cells that matter")
    return f"No key was given, so they show {shows}: a decoy, not an explanation."
