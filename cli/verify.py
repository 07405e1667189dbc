"""`keyed-xai verify`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from keyed_xai_cli.groups import grouped
from keyed_xai_cli.header_options import HeaderOptions
from keyed_xai_cli.main import NOT_SHOWN
from keyed_xai_cli.model_options import ModelOptions, tell_notes
from keyed_xai_cli.options import (
    STANDARD_OUTPUT,
    KeyOptions,
    choose_device,
    device_option,
    emit_json,
    follow_links_option,
    json_option,
    name_given,
    say,
)

if TYPE_CHECKING:
    from keyed_xai.artifacts.card import Card
    from keyed_xai.data import ImageData
    from keyed_xai.models import Classifier
    from keyed_xai.ownership import Claim, Verification
    from keyed_xai.ownership.black_box import BlackBox


_GIVEN_AWAY = (
    "Warning: whoever runs this server can learn the trigger from the images of the secret test. Test with "
    "--public-key or --license alone to give nothing away."
)


def _check_suspect(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if value.startswith(("http://", "https://")):
        return value
    from keyed_xai.outputs import put_back

    put_back(Path(value))
    if not Path(value).exists():
        raise click.BadParameter(f"{value!r} is neither a file or folder nor an address that starts with http.")
    return value


def _read_level(_ctx: click.Context, _parameter: click.Parameter, value: str) -> float:
    """Return a probability in decimals or as a power of two."""
    base, power, exponent = value.partition("^")
    try:
        level = float(base) ** int(exponent) if power else float(base)
    except (ValueError, ArithmeticError):
        level = 0.0
    if not (isinstance(level, float) and 0 < level < 1):
        raise click.BadParameter(f"expected a probability between 0 and 1, such as 2^-40 or 1e-6; got {value!r}.")
    return level


@dataclass(frozen=True, kw_only=True)
class ClaimOptions(KeyOptions):
    """Options that say whose claim is tested, and what it says."""

    public_key: Annotated[Path | None, click.option(
        "--public-key", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="The owner's public key, PEM, in place of --key-file: tests the public pattern only.",
    )]  # fmt: skip
    license_path: Annotated[Path | None, click.option(
        "--license", "license_path", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="The owner's license.json, which says what is claimed. Must be signed with the key given.",
    )]  # fmt: skip

    def check(self) -> None:
        """Refuse a claim of nobody, and of two keys."""
        if self.key_file is not None and self.public_key is not None:
            raise click.UsageError("Give --key-file or --public-key, not both.")
        if self.key_file is None and self.public_key is None and self.license_path is None:
            raise click.UsageError("Give --key-file, --public-key or --license: whose claim is it?")

    def read_claim(self, suspect: "Path | Card | None") -> "Claim":
        """Return what is claimed of a suspect; see `verification.read_claim`."""
        from keyed_xai.ownership.verifying import read_claim, read_public_key

        key = self.read() or (read_public_key(self.public_key) if self.public_key is not None else None)
        return read_claim(suspect, key=key, license_path=self.license_path)


@dataclass(frozen=True, kw_only=True)
class EvidenceOptions:
    """What the tests are made on, and how much evidence they ask for."""

    folder: Annotated[Path | None, click.option(
        "--images", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder of images to test on, your own and not the claimant's; a public set that comes along if absent.",
    )]  # fmt: skip
    count: Annotated[int, click.option(
        "--count", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Images to test on."
    )]  # fmt: skip
    decoys: Annotated[int, click.option(
        "--decoys", type=click.IntRange(1), default=999, show_default=True, help="Random keys tried, at most."
    )]  # fmt: skip
    alpha: Annotated[float, click.option(
        "--alpha", default="2^-40", show_default=True, metavar="PROBABILITY", callback=_read_level,
        help="Largest probability of a chance match that counts as shown, such as 2^-40 or 1e-6.",
    )]  # fmt: skip
    search: Annotated[bool, click.option(
        "--search/--no-search", default=True, show_default=True,
        help="Look through exact re-encodings of the weights when the model as it stands does not show the pattern.",
    )]  # fmt: skip
    seed: Annotated[int | None, click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), help="Of the random keys; from the operating system if absent."
    )]  # fmt: skip
    follow_links: Annotated[bool, follow_links_option]


@click.command()
@click.argument("suspect", callback=_check_suspect)
@grouped(claim_options=ClaimOptions, evidence=EvidenceOptions, headers=HeaderOptions, model_options=ModelOptions)
@device_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    suspect: str,
    claim_options: ClaimOptions,
    evidence: EvidenceOptions,
    headers: HeaderOptions,
    model_options: ModelOptions,
    device: str,
    json_path: Path | None,
) -> None:
    """Test whether a model was protected with a key.

    SUSPECT is a file of weights, or a protected model's folder, of which only the weights are trusted. Or it is one
    that only answers: an ONNX file, or the address of a server that speaks the Open Inference Protocol,
    http://HOST:PORT or http://HOST:PORT/v2/models/NAME.

    Two exact tests: do its maps move for this key's trigger more than for random keys' (needs --key-file), and do its
    unkeyed maps show the owner's public pattern (needs --key-file, --public-key or --license)? They are independent,
    and count together. Exit code 0: shown, 3: not shown.

    The public pattern alone shows that somebody trained the model to show it; that it was the owner, the secret test
    shows. A model that shows the pattern and does not answer to the secret trigger is not shown to be the key's.

    When the model as it stands does not show the pattern, it is looked at through exact re-encodings that a thief gets
    for nothing: kernels turned or mirrored, channels reordered, pixels inverted or normalised otherwise, classes added.
    All looks are counted. Give --mean and --std where you know how the suspect is run.

    A server that is tested with --key-file sees images with and without the trigger, and whoever runs it can learn the
    trigger from them, though never the key; unless it shows the public pattern, the secret test is not made.
    --public-key, or --license alone, makes the second test only and gives nothing away.

    VisualBackProp's maps are tested and count for nothing: rescaling channels changes them at no cost in accuracy, so
    that a claim which rests on them alone is not shown.

    Chances are those of a key, and a licence with its card, that were fixed before their holder saw the model. Whoever
    tries a million keys on somebody else's model finds a match of one in a million: ask for a licence dated by a third
    party, or a smaller --alpha.
    """
    from keyed_xai.ownership import load_probe

    claim_options.check()
    model, claim = _open_suspect(suspect, claim_options, headers.merge(), model_options, device)
    probe = load_probe(model.input, folder=evidence.folder, count=evidence.count, follow_links=evidence.follow_links)
    result = _verify(model, claim, probe, evidence)
    document = result.to_json(suspect)
    emit_json(document, schema="verify-report", json_path=json_path)
    _print_table(document, to_stderr=json_path == STANDARD_OUTPUT)
    for note in result.claim.notes:
        say(f"Note: {note}", json_path=json_path)
    if probe.skipped:
        say(f"Note: {len(probe.skipped)} broken images were left out.", json_path=json_path)
    say(result.sentence, json_path=json_path)
    if not result.verdict.shown:
        ctx.exit(NOT_SHOWN)


def _open_suspect(
    suspect: str, claim_options: ClaimOptions, headers: dict[str, str], model_options: ModelOptions, device: str
) -> "tuple[Classifier | BlackBox, Claim]":
    from keyed_xai.artifacts.opening import open_model
    from keyed_xai.ownership.black_box import is_black_box, open_black_box
    from keyed_xai.ownership.verifying import find_weights

    choices = model_options.choose()
    if is_black_box(suspect):
        given = name_given(**asdict(model_options))
        if given:
            raise click.UsageError(f"{', '.join(given)}: the suspect only answers, and says itself how it is run.")
        if suspect.startswith("http") and claim_options.key_file is not None:
            click.echo(_GIVEN_AWAY, err=True)
        black_box = open_black_box(suspect, device=device, headers=headers)
        return black_box, claim_options.read_claim(black_box.card)
    if headers:
        raise click.UsageError("Leave out --header and --header-file: they are for a server's address.")
    claim = claim_options.read_claim(Path(suspect))
    classifier, _ = open_model(find_weights(Path(suspect)), card=claim.card, trusted=False, **choices)
    tell_notes(classifier)
    return classifier.to(choose_device(device)), claim


def _verify(
    model: "Classifier | BlackBox", claim: "Claim", probe: "ImageData", evidence: EvidenceOptions
) -> "Verification":
    from keyed_xai.ownership.verifying import verify as run_tests
    from keyed_xai.reporting.bars import progress_bar

    with progress_bar() as progress:
        return run_tests(
            model,
            claim,
            probe,
            alpha=evidence.alpha,
            decoys=evidence.decoys,
            search=evidence.search,
            seed=evidence.seed,
            progress=progress,
        )


def _print_table(document: dict[str, Any], *, to_stderr: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Claim of key {document['key_id'][:16]}", title_justify="left")
    counted = set(document["counted"])
    for heading in ("test", "found", "chance gives", "p"):
        table.add_column(heading)
    opening, signature, probe = document["opening"], document["signature"], document["probe"]
    if opening["decoys"]:
        table.add_row(
            "opening (secret)",
            _rounded(opening["statistic"]),
            f"at most {_rounded(opening['largest_decoy'])} with {opening['decoys']} random keys",
            f"{opening['p_value']:.2g}",
        )
    patterns = {"signature (public)": signature} if signature["cells"] else {}
    if len(signature["interpreters"]) > 1:
        patterns |= {
            f"  {name}" if name in counted else f"  {name}, not counted": each
            for name, each in signature["interpreters"].items()
        }
    for name, each in patterns.items():
        table.add_row(
            name,
            f"{each['overlap']} of {each['possible']} cells",
            f"about {each['possible'] / 2:.0f}",
            f"2^{each['log2_p']:.1f}",
        )
    console = Console(stderr=to_stderr)
    console.print(table)
    console.print(f"On {probe['images']} images: {probe['source']}.", highlight=False, markup=False)


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
