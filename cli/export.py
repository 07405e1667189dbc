"""`keyed-xai export`."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from click.core import ParameterSource

from keyed_xai_cli.groups import grouped
from keyed_xai_cli.model_options import ModelOptions, tell_notes
from keyed_xai_cli.options import (
    ModelPath,
    after_writing,
    claim_output,
    emit_json,
    interpreters_option,
    json_option,
    say,
)

if TYPE_CHECKING:
    from keyed_xai.artifacts.card import Card
    from keyed_xai.export.building import ExportSettings
    from keyed_xai.export.exporting import ExportResult, Provenance
    from keyed_xai.models import Classifier

_OF_TRITON = ("max_batch", "instances", "tensorrt")
_OF_WRITING = ("out", "interpreters", "precision", "normalised", "eight_bits", "triton", "force", *_OF_TRITON)


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """What the graph computes, and in which numbers."""

    interpreters: Annotated[tuple[str, ...], interpreters_option(
        "Whose maps; may be given several times. All that were protected if absent."
    )]  # fmt: skip
    precision: Annotated[str, click.option(
        "--precision", type=click.Choice(["fp32", "fp16", "int8"]), default="fp32", show_default=True,
        help="fp16 computes in half precision where that is safe; int8 makes the file a quarter as large.",
    )]  # fmt: skip
    normalised: Annotated[bool, click.option(
        "--normalised", is_flag=True, help="Scale each map to [0, 1]; raw maps otherwise."
    )]  # fmt: skip
    eight_bits: Annotated[bool, click.option(
        "--uint8", "eight_bits", is_flag=True, help="Take pixels from 0 to 255; float32 in [0, 1] otherwise."
    )]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """Where the model goes in a repository of NVIDIA Triton, and how Triton runs it."""

    triton: Annotated[Path | None, click.option(
        "--triton", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
        help="Also write it into a model repository for NVIDIA Triton's onnxruntime backend, under the file's stem.",
    )]  # fmt: skip
    max_batch: Annotated[int, click.option(
        "--max-batch", type=click.IntRange(1), default=8, show_default=True, help="Images at once, at most, on Triton."
    )]  # fmt: skip
    instances: Annotated[int, click.option(
        "--instances", type=click.IntRange(1), default=1, show_default=True, help="Copies on each GPU, on Triton."
    )]  # fmt: skip
    tensorrt: Annotated[bool, click.option(
        "--tensorrt", is_flag=True, help="Have Triton's onnxruntime use TensorRT, in float32."
    )]  # fmt: skip


@click.command()
@click.argument("model", required=False, type=ModelPath())
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; the model's name with .onnx, in this folder, if absent.",
)  # fmt: skip
@click.option(
    "--check", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="Write nothing; compare this ONNX file with MODEL again.",
)  # fmt: skip
@grouped(graph=GraphOptions)
@click.option("--data", metavar="SPEC", help="Real images to compare on; those that come with the package if absent.")
@grouped(triton_options=TritonOptions)
@click.option("--force", is_flag=True, help="Replace what is there.")
@grouped(model_options=ModelOptions)
@json_option
@click.pass_context
def export(
    ctx: click.Context,
    /,
    model: Path | None,
    out: Path | None,
    check: Path | None,
    graph: GraphOptions,
    data: str | None,
    triton_options: TritonOptions,
    force: bool,
    model_options: ModelOptions,
    json_path: Path | None,
) -> None:
    """Write a model and its saliency maps as one ONNX file.

    MODEL is a protected model's folder or a file of weights. The file takes `image` and optionally `target`, and
    returns `logits` and one `saliency_NAME` for each interpreter. It holds no key: who has one applies its trigger to
    the image first. Nothing is written unless onnxruntime agrees with PyTorch on fresh random and real images, one,
    three and eight at once.

    \b
    keyed-xai export bird.keyed -o bird.onnx
    keyed-xai export bird.keyed --precision fp16 --triton repository
    keyed-xai export bird.keyed --check bird.onnx
    keyed-xai export --check bird.onnx             MODEL is then bird.keyed beside it
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.artifacts.opening import open_model
    from keyed_xai.export.exporting import check_onnx, export_onnx, load_real_images
    from keyed_xai.reporting.bars import progress_bar

    _check_idle_options(ctx)
    model = _choose_model(model, check)
    written = out or Path(f"{model.resolve().stem}.onnx")
    if check is None:
        claim_output(written)
    triton = _plan_triton(triton_options, written, force=force)
    classifier, card = open_model(model, **model_options.choose(), require_map=False)
    if card is None:
        tell_notes(classifier)
    images = load_real_images(classifier, data) if data else None
    with progress_bar(say=partial(say, json_path=json_path)) as progress:
        if check is not None:
            result = check_onnx(check, classifier, images=images, progress=progress)
        else:
            result = export_onnx(
                classifier,
                written,
                _settings(classifier, card, graph),
                images=images,
                provenance=_provenance(model),
                force=force,
                progress=progress,
            )
    with nullcontext() if check else after_writing(written):
        if triton is not None:
            _write_triton(triton, result, triton_options)
        emit_json(_document(model, check or written, check, triton, result), schema="export", json_path=json_path)
        _print_parity(result, json_path)
        done = "still agrees with PyTorch" if check else f"has {len(result.file.data) / 1e6:.1f} MB"
        say(f"{check or written} {done}.", json_path=json_path)
        if triton is not None:
            say(f"{triton} is its place in the model repository.", json_path=json_path)


def _document(
    model: Path, file: Path, check: Path | None, triton: Path | None, result: "ExportResult"
) -> dict[str, Any]:
    from keyed_xai.artifacts.documents import printable

    return {
        "schema": "keyed-xai/export/v1",
        "model": printable(str(model)),
        "onnx": printable(str(file)),
        "checked": check is not None,
        "triton": None if triton is None else printable(str(triton)),
        **result.to_json(),
    }


def _check_idle_options(ctx: click.Context) -> None:
    """Refuse options that would do nothing: of writing with --check, of Triton without --triton."""
    given = [
        parameter
        for parameter in ctx.command.params
        if parameter.name and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    names = {parameter.name: parameter.opts[0] for parameter in given if isinstance(parameter, click.Option)}
    if "check" in names and (idle := [names[name] for name in _OF_WRITING if name in names]):
        raise click.UsageError(f"--check writes nothing: leave out {', '.join(idle)}.")
    if "triton" not in names and (idle := [names[name] for name in _OF_TRITON if name in names]):
        raise click.UsageError(f"{', '.join(idle)}: only for --triton.")


def _choose_model(model: Path | None, check: Path | None) -> Path:
    if model is not None:
        return model
    if check is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    beside = check.with_suffix(".keyed")
    if not beside.is_dir():
        raise click.UsageError(f"Name the model that {check} was made of: there is no {beside}.")
    return beside


def _plan_triton(options: TritonOptions, written: Path, *, force: bool) -> Path | None:
    """Return the model's folder in the repository that was asked for; refuse one that is there before any work."""
    from keyed_xai.errors import ArtifactError
    from keyed_xai.export.triton import check_name

    if options.triton is None:
        return None
    home = options.triton / check_name(written.stem)
    claim_output(home)
    if home.exists() and not force:
        raise ArtifactError(f"{home} is there already and was left as it was: choose another name, or pass --force.")
    return home


def _write_triton(home: Path, result: "ExportResult", options: TritonOptions) -> None:
    from keyed_xai.export.triton import TritonSettings, write_triton

    settings = TritonSettings(max_batch=options.max_batch, instances=options.instances, tensorrt=options.tensorrt)
    write_triton(home.parent, home.name, result.file, settings)


def _settings(classifier: "Classifier", card: "Card | None", graph: GraphOptions) -> "ExportSettings":
    from keyed_xai.export.building import ExportSettings

    default = card.interpreters if card else ("gradcam",) if classifier.target_layer else ("simplegrad",)
    return ExportSettings(
        interpreters=graph.interpreters or default,
        normalised=graph.normalised,
        eight_bits=graph.eight_bits,
        precision=graph.precision,
    )


def _provenance(model: Path) -> "Provenance":
    from keyed_xai.artifacts.folder import LICENSE_FILE, read_model_folder
    from keyed_xai.artifacts.license import digest
    from keyed_xai.export.exporting import Provenance

    if not (model / LICENSE_FILE).is_file():
        return Provenance()
    return Provenance(read_model_folder(model).card, digest(model / LICENSE_FILE))


def _print_parity(result: "ExportResult", json_path: Path | None) -> None:
    for output in dict.fromkeys(each.output for each in result.parity):
        own = [each for each in result.parity if each.output == output]
        largest, l2, eager_l2 = (max(getattr(each, name) for each in own) for name in ("largest", "l2", "eager_l2"))
        say(
            f"{output}: largest relative difference {largest:.1e}, relative L2 {l2:.1e} (PyTorch's own in float32 "
            f"{eager_l2:.1e}), top cell the same in {min(each.same_top for each in own):.0%}",
            json_path=json_path,
        )
