"""`keyed-xai bench serving`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keyed_xai_cli.bench_paper import read_models
from keyed_xai_cli.options import (
    after_writing,
    choose_device,
    device_option,
    emit_json,
    json_option,
    key_options,
    read_key,
    say,
)

if TYPE_CHECKING:
    from keyed_xai.benchmarks.serving_figures import ServingRun

_ARCHITECTURES = ("resnet50", "vgg19", "densenet121")


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(["graphs", "load", "files"]), help="All if absent.")
@click.option(
    "--arch", "architectures", multiple=True, type=click.Choice(_ARCHITECTURES), help="Networks; all three if absent."
)
@click.option(
    "--model", "models", multiple=True, metavar="ARCH=FILE", callback=read_models,
    help="Trained weights; the others are fitted to --data for one pass at 64 px and kept.",
)  # fmt: skip
@click.option(
    "--data", default="builtin", show_default=True, metavar="SPEC", help="Real images, to fit and to compare."
)
@click.option("--images", type=click.IntRange(2), default=50, show_default=True, help="Compared with PyTorch.")
@click.option("--repeats", type=click.IntRange(3), default=15, show_default=True, help="Rounds of timing.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images at once in timing.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="fp32 on the CPU, fp16 on a GPU if absent."
)
@click.option(
    "--keyed", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Protected model that is served; the demo's, made first, if absent. Needs --key-file and --reference.",
)  # fmt: skip
@key_options(required=False)
@click.option(
    "--reference",
    type=click.Path(exists=True, path_type=Path),
    help="Weights of the protected model before protection.",
)
@click.option(
    "--keyed-data", metavar="SPEC", default="builtin", show_default=True, help="Images that it is asked about."
)
@click.option("--clients", type=click.IntRange(1, 10_000), default=200, show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=60, show_default=True, help="Of load.")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), default="bench-out", show_default=True)
@device_option
@json_option
def serving(out: Path, json_path: Path | None, **arguments: Any) -> None:  # noqa: ANN401
    """Measure exported graphs and a running server.

    Graphs: agreement with PyTorch at 224 px, time over the plain logits graph, images a second over pytorch-grad-cam
    (pip install 'keyed-xai[bench]') and captum. Server: many clients at once on loopback; keyed PNG and JPEG files
    sent to it. Parts that are finished are kept in --out.

    \b
    keyed-xai bench serving
    keyed-xai bench serving --part graphs --device cuda          the same on a GPU, in float16
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.artifacts.documents import write_atomically
    from keyed_xai.benchmarks.serving_figures import render

    if arguments["keyed"] is not None and (arguments["key_file"] is None or arguments["reference"] is None):
        raise click.UsageError("--keyed needs --key-file and --reference.")
    run = _plan(out, arguments)
    document = _run(run, arguments["parts"] or ("graphs", "load", "files"))
    table = render(document)
    write_atomically(out / "serving.md", table.encode())
    with after_writing(out):
        emit_json(document, schema="serving-figures", json_path=json_path)
        say(table, json_path=json_path)


def _plan(out: Path, arguments: dict[str, Any]) -> "ServingRun":
    from keyed_xai.benchmarks.serving import ServingSettings
    from keyed_xai.benchmarks.serving_figures import Served, ServingRun
    from keyed_xai.benchmarks.serving_load import LoadSettings
    from keyed_xai.claims import prepare_folder

    device = choose_device(arguments["device"])
    precision = arguments["precision"] or ("fp32" if device == "cpu" else "fp16")
    names = ("images", "repeats", "batch", "threads")
    served = None
    if arguments["keyed"] is not None:
        key = read_key(arguments["key_file"], arguments["passphrase_file"])
        served = Served(arguments["keyed"], arguments["reference"], key)
    prepare_folder(out)
    return ServingRun(
        folder=out,
        graphs=ServingSettings(
            **{name: arguments[name] for name in names}, device=device.partition(":")[0], precision=precision
        ),
        load=LoadSettings(arguments["clients"], arguments["seconds"], arguments["threads"]),
        architectures=arguments["architectures"] or _ARCHITECTURES,
        models=arguments["models"],
        data=arguments["data"],
        served=served,
        served_data=arguments["keyed_data"],
    )


def _run(run: "ServingRun", parts: tuple[str, ...]) -> dict[str, Any]:
    from keyed_xai.benchmarks.serving_figures import measure
    from keyed_xai.progress import phases, progress_bar

    with progress_bar() as progress:
        return measure(run, parts, on_phase=phases(progress))
