"""`keyed-xai keygen`."""

from pathlib import Path

import click

from keyed_xai_cli.options import after_writing, emit_json, json_option, passphrase_option, read_passphrase, say


@click.command()
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Where to write the key, PEM.")
@passphrase_option
@click.option("--force", is_flag=True, help="Write over an existing file. A lost key cannot be made again.")
@json_option
def keygen(out: Path, passphrase_file: Path | None, force: bool, json_path: Path | None) -> None:
    """Make an Ed25519 owner key.

    The file is readable by its owner only and never written over an existing one unless --force is given. Keep a
    copy in a safe place: whoever has it can open the maps, and without it nothing can be proved.
    """
    from keyed_xai.keys import OwnerKey, write_owner_key

    key = OwnerKey.generate()
    passphrase = read_passphrase(passphrase_file)
    write_owner_key(out, key, passphrase=passphrase, force=force)
    result = {
        "schema": "keyed-xai/keygen/v1",
        "path": str(out),
        "key_id": key.public.key_id,
        "public_key": key.public.to_pem().decode(),
        "encrypted": passphrase is not None,
    }
    lock = "encrypted" if passphrase is not None else "not encrypted: consider --passphrase-file"
    with after_writing(out):
        emit_json(result, schema="keygen", json_path=json_path)
        say(f"Wrote {out} ({lock}). Key id {key.public.key_id}.", json_path=json_path)
