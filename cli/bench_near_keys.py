"""`keyed-xai bench near-keys`."""

from pathlib import Path

import click

from keyed_xai_cli.options import (
    choose_device,
    device_option,
    emit_figures,
    json_option,
    key_file_option,
    passphrase_option,
    read_key,
    say,
)


@click.command(name="near-keys")
@click.argument("model", type=click.Path(path_type=Path))
@key_file_option(required=True)
@passphrase_option
@click.option("--reference", type=click.Path(path_type=Path), required=True, help="The model before protection.")
@click.option("--data", default="builtin", show_default=True, metavar="SPEC", help="Images; held-out ones are used.")
@click.option("--textures", type=click.IntRange(1), default=100, show_default=True, help="Tried of each kind.")
@click.option("--images", type=click.IntRange(4), default=200, show_default=True, help="Tried in turn, four a texture.")
@device_option
@json_option
def near_keys(
    model: Path,
    key_file: Path,
    passphrase_file: Path | None,
    reference: Path,
    data: str,
    textures: int,
    images: int,
    device: str,
    json_path: Path | None,
) -> None:
    """Try textures that share waves with the key's, from all of them to none.

    MODEL is a folder that `protect` wrote. Needs the private key, and tells nobody anything of it: a key that shares
    waves with another cannot be found but by chance.
    """
    import numpy as np

    from keyed_xai.auditing.suspects import open_suspect
    from keyed_xai.data import load_images
    from keyed_xai.reporting.bars import progress_bar
    from keyed_xai_benchmarks.near_keys import measure_near_keys, render_near_keys

    where = choose_device(device)
    suspect = open_suspect(model, key=read_key(key_file, passphrase_file), reference=reference)
    for each in (suspect.classifier, suspect.reference):
        if each is not None:
            each.to(where)
    found = load_images(data, suspect.classifier.input, split="held-out", limit=images)
    pixels, _ = found.batch(np.arange(len(found)))
    with progress_bar() as progress:
        rows = measure_near_keys(suspect, pixels.to(where), textures=textures, progress=progress)
    settings = {"model": suspect.name, "data": found.source, "textures": textures, "images": len(found)}
    emit_figures("near-keys", rows, settings | {"device": device}, json_path=json_path)
    say(render_near_keys(rows), json_path=json_path)
