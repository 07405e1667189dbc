"""`keyed-xai protect`."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from keyed_xai_cli.groups import grouped
from keyed_xai_cli.model_options import ModelOptions, tell_notes
from keyed_xai_cli.options import (
    STANDARD_OUTPUT,
    RunOptions,
    after_writing,
    choose_device,
    claim_model_folder,
    emit_json,
    end_with_verdict,
    grid_option,
    interpreters_option,
    key_file_option,
    only_given,
    passphrase_option,
    read_key,
    resumable,
    resume_option,
    say,
)
from keyed_xai_cli.training_options import TrainingOptions, choose_training, load_both_images

if TYPE_CHECKING:
    from keyed_xai.data import ImageData
    from keyed_xai.models import Classifier
    from keyed_xai.protection import ProtectSettings
    from keyed_xai.training import TrainingSettings

_INTERPRETERS = ("gradcam",)
_LEGEND = (
    "keyed, clean, wrong key: mean correlation with the maps before protection.",
    "decoy: mean correlation of clean maps with what they should show instead.",
    "CR, correct rate: keyed maps that are right. FSR, fooling success rate: unkeyed maps that show the decoy. Both at "
    "the paper's threshold on the distance to the decoy.",
)


@dataclass(frozen=True, kw_only=True)
class ProtectOptions:
    """What is protected, and how."""

    interpreters: Annotated[tuple[str, ...], interpreters_option(
        "What to protect; may be given several times. Grad-CAM if absent."
    )]  # fmt: skip
    spec: Annotated[str | None, click.option(
        "--data", "spec", metavar="SPEC",
        help="Images to learn from, labels not needed: builtin (default), fashion-mnist[:DIR], imagefolder:DIR, "
        "cub200:DIR, chestxray14:DIR.",
    )]  # fmt: skip
    decoy: Annotated[str, click.option(
        "--decoy", type=click.Choice(["signature", "boundary", "nontargeted"]), default="signature", show_default=True,
        help="What maps show without the key: the owner's public pattern, the image's boundary, or not the top "
        "quarter.",
    )]  # fmt: skip
    trigger: Annotated[str, click.option(
        "--trigger", type=click.Choice(["spread", "nashville", "moire"]), default="spread", show_default=True,
        help="Trigger family. Photo filters and lines, nashville and moire, have so few effective key bits that other "
        "keys open by chance: for experiments.",
    )]  # fmt: skip
    amplitude: Annotated[float | None, click.option(
        "--amplitude", type=click.FloatRange(0.5, 64),
        help="Of --trigger spread, in 1/255; if absent 5, or 8 for images under two tiles.",
    )]  # fmt: skip
    tile: Annotated[int | None, click.option(
        "--tile", type=click.IntRange(24, 256), help="Of --trigger spread, pixels; 32 if absent."
    )]  # fmt: skip
    grid: Annotated[tuple[int, int] | None, grid_option("Compare maps on N x N cells; at most 8 if absent.")]
    without_ownership: Annotated[bool, click.option(
        "--without-ownership", is_flag=True,
        help="Protect the maps though ownership of the result could not be shown, as with another decoy than "
        "signature.",
    )]  # fmt: skip
    hardening: Annotated[str | None, click.option(
        "--hardening", type=click.Choice(["none", "standard"]),
        help="Train against simulated attackers who fine-tune or prune the model, so that the gate outlasts them.",
    )]  # fmt: skip
    wrong_keys: Annotated[int, click.option(
        "--wrong-keys", type=click.IntRange(0), default=1000, show_default=True,
        help="Tried in the report, and the 256 that differ from the key in one bit; 0 tries none.",
    )]  # fmt: skip
    held_out: Annotated[int, click.option(
        "--held-out", type=click.IntRange(2), default=500, show_default=True, help="Images the report uses."
    )]  # fmt: skip


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@key_file_option(required=True)
@passphrase_option
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write; MODEL's name with .keyed if absent."
)
@grouped(options=ProtectOptions, training=TrainingOptions)
@resume_option
@click.option("--force", is_flag=True, help="Replace a protected model, or a stopped run, that is there.")
@grouped(model_options=ModelOptions, run=RunOptions)
def protect(
    model: Path,
    key_file: Path,
    passphrase_file: Path | None,
    out: Path | None,
    options: ProtectOptions,
    training: TrainingOptions,
    resume: bool,
    force: bool,
    model_options: ModelOptions,
    run: RunOptions,
) -> None:
    """Make a model whose saliency maps are right only with the key; its predictions stay.

    MODEL is a file of weights (.pt state dict or .safetensors). The architecture is recognised from it. Says what it
    will do and how long that may take, trains until the goals hold, writes a folder with the weights, a card, a signed
    licence and a report, and ends with a verdict; exit code 3 means not protected. A run that is stopped goes on with
    --resume.

    \b
    keyed-xai protect model.pt --key-file k.pem
    keyed-xai protect model.pt --key-file k.pem --interpreter gradcam --interpreter simplegrad \\
        --data imagefolder:photos -o model.keyed
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.models import load_classifier
    from keyed_xai.models.loading import OWN_CODE, describe_own_code
    from keyed_xai.protection import write_protection
    from keyed_xai.protection.protecting import protect as protect_model
    from keyed_xai.reporting.bars import progress_bar

    json_path = run.json_path
    out = out or model.with_name(f"{model.stem}.keyed")
    key = read_key(key_file, passphrase_file)
    checkpoint = claim_model_folder(out, force=force, resume=resume)
    classifier = load_classifier(model, **model_options.choose())
    tell_notes(classifier)
    choice = training.choose_data(options.spec or "builtin", held_out=options.held_out, seed=run.seed)
    train_data, held_out = load_both_images(classifier.input, choice)
    recipe = _choose_recipe(classifier, options, train_data)
    recipe = choose_training(recipe, len(train_data), training, seed=run.seed)
    settings = replace(_settings(options), training=recipe, fixed_layer=model_options.target_layer is not None)
    _warn_of_weak_trigger(settings, classifier)
    with resumable(checkpoint), progress_bar(say=partial(say, json_path=json_path)) as progress:
        protection = protect_model(
            classifier,
            key,
            train_data,
            held_out,
            settings,
            device=choose_device(run.device),
            checkpoint=checkpoint,
            resume=resume,
            progress=progress,
        )
    written = write_protection(protection, out, key, force=force, checkpoint=checkpoint)
    with after_writing(out):
        emit_json(protection.report, schema="protect-report", json_path=json_path)
        print_summary(protection.report, to_stderr=json_path == STANDARD_OUTPUT)
        if protection.card.source in OWN_CODE:
            say(f"To open the folder, {describe_own_code(protection.card.architecture)}", json_path=json_path)
        say(f"Wrote {written.folder}. Open {written.folder / 'report.html'} for pictures.", json_path=json_path)
    end_with_verdict(protection.report["verdict"], json_path=json_path)


def print_summary(report: dict[str, Any], *, to_stderr: bool = False) -> None:
    """Print a table of what was measured on held-out images."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out images", title_justify="left")
    for heading in ("", "keyed", "clean", "wrong key", "decoy", "CR", "FSR", "wrong keys that open"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, figures in report["interpreters"].items():
        agreement, tried = figures["correlation"], figures["wrong_keys"]
        decoy = figures.get("decoy_correlation", {}).get("clean")
        table.add_row(
            name,
            *(f"{agreement[case]:.3f}" for case in ("keyed", "clean", "wrong_key")),
            "-" if decoy is None else f"{decoy:.3f}",
            f"{figures['cr']:.1f} %",
            f"{figures['fsr']:.1f} %",
            f"{tried['opened']} of {tried['tried']}" if tried["tried"] else "none tried",
        )
    console = Console(stderr=to_stderr)
    console.print(table)
    for line in (*_LEGEND, _predictions_in_words(report["accuracy"])):
        console.print(line, highlight=False)


def _predictions_in_words(accuracy: dict[str, Any]) -> str:
    cases = [f"{case} {accuracy[case]:.3f}" for case in ("keyed", "clean")]
    if accuracy["measured_against"] == "labels":
        return f"Accuracy: reference {accuracy['reference']:.3f}, {', '.join(cases)}."
    confident = accuracy["confident"]
    sure = [f"{case} {confident['agreement'][case]:.3f}" for case in ("keyed", "clean") if confident["images"]]
    also = f"; where it gives a class more than .5 ({confident['images']} images): {', '.join(sure)}" if sure else ""
    return f"Agreement with the reference's predictions: {', '.join(cases)}{also}."


def _warn_of_weak_trigger(settings: "ProtectSettings", classifier: "Classifier") -> None:
    from keyed_xai.artifacts.opening import make_family
    from keyed_xai.protection.protecting import choose_trigger
    from keyed_xai.triggers import STRONG_KEY_BITS

    bits = make_family(choose_trigger(settings, classifier.input)).key_bits
    if bits < STRONG_KEY_BITS:
        click.echo(
            f"Warning: --trigger {settings.trigger} has about {bits} bits of key: one other key in {2**bits}, or so, "
            "opens the model. Use spread for anything that matters.",
            err=True,
        )


def _choose_recipe(classifier: "Classifier", options: ProtectOptions, data: "ImageData") -> "TrainingSettings":
    from keyed_xai.protection.protecting import choose_recipe
    from keyed_xai.training import HARDENINGS

    recipe = choose_recipe(classifier, options.interpreters or _INTERPRETERS, data)
    return recipe if options.hardening is None else replace(recipe, hardening=HARDENINGS[options.hardening])


def _settings(options: ProtectOptions) -> "ProtectSettings":
    from keyed_xai.protection import ProtectSettings

    texture = only_given(amplitude=options.amplitude, tile=options.tile)
    if texture and options.trigger != "spread":
        raise click.UsageError(f"--amplitude and --tile belong to --trigger spread, not to {options.trigger}.")
    return ProtectSettings(
        interpreters=options.interpreters or _INTERPRETERS,
        decoy=options.decoy,
        trigger=options.trigger,
        **texture,
        grid=options.grid,
        ownership=not options.without_ownership,
        wrong_keys=options.wrong_keys,
        flipped_keys=256 if options.wrong_keys else 0,
        held_out_images=options.held_out,
    )
