"""`keyed-xai bench serving`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from keyed_xai_cli.bench_paper import read_models
from keyed_xai_cli.groups import grouped
from keyed_xai_cli.options import (
    after_writing,
    bench_out_option,
    choose_device,
    device_option,
    emit_json,
    json_option,
    key_file_option,
    passphrase_option,
    read_key,
    say,
)

if TYPE_CHECKING:
    from keyed_xai_benchmarks.serving_figures import Served, ServingRun

_ARCHITECTURES = ("resnet50", "vgg19", "densenet121")


@dataclass(frozen=True, kw_only=True)
class TimedGraphOptions:
    """The graphs that are timed, and how."""

    architectures: Annotated[tuple[str, ...], click.option(
        "--arch", "architectures", multiple=True, type=click.Choice(_ARCHITECTURES),
        help="Networks; all three if absent.",
    )]  # fmt: skip
    models: Annotated[dict[str, Path], click.option(
        "--model", "models", multiple=True, metavar="ARCH=FILE", callback=read_models,
        help="Trained weights; the others are fitted to --data for one pass at 64 px and kept.",
    )]  # fmt: skip
    data: Annotated[str, click.option(
        "--data", default="builtin", show_default=True, metavar="SPEC", help="Real images, to fit and to compare."
    )]  # fmt: skip
    images: Annotated[int, click.option(
        "--images", type=click.IntRange(2), default=50, show_default=True, help="Compared with PyTorch."
    )]  # fmt: skip
    repeats: Annotated[int, click.option(
        "--repeats", type=click.IntRange(3), default=15, show_default=True, help="Rounds of timing."
    )]  # fmt: skip
    batch: Annotated[int, click.option(
        "--batch", type=click.IntRange(1), default=1, show_default=True, help="Images at once in timing."
    )]  # fmt: skip
    threads: Annotated[int, click.option("--threads", type=click.IntRange(1), default=1, show_default=True)]
    precision: Annotated[str | None, click.option(
        "--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="fp32 on the CPU, fp16 on a GPU if absent."
    )]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServedOptions:
    """The protected model that is served, its key, and how it is asked."""

    keyed: Annotated[Path | None, click.option(
        "--keyed", type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Protected model that is served; the demo's, made first, if absent. Needs --key-file and --reference.",
    )]  # fmt: skip
    key_file: Annotated[Path | None, key_file_option(required=False)]
    passphrase_file: Annotated[Path | None, passphrase_option]
    reference: Annotated[Path | None, click.option(
        "--reference", type=click.Path(exists=True, path_type=Path),
        help="Weights of the protected model before protection.",
    )]  # fmt: skip
    keyed_data: Annotated[str, click.option(
        "--keyed-data", metavar="SPEC", default="builtin", show_default=True, help="Images that it is asked about."
    )]  # fmt: skip
    clients: Annotated[int, click.option(
        "--clients", type=click.IntRange(1, 10_000), default=200, show_default=True
    )]  # fmt: skip
    seconds: Annotated[float, click.option(
        "--seconds", type=click.FloatRange(1), default=60, show_default=True, help="Of load."
    )]  # fmt: skip

    def read(self) -> "Served | None":
        """Return the model and its key; None where the demo's is served."""
        if self.keyed is None:
            return None
        if self.key_file is None or self.reference is None:
            raise click.UsageError("--keyed needs --key-file and --reference.")
        from keyed_xai_benchmarks.serving_figures import Served

        return Served(self.keyed, self.reference, read_key(self.key_file, self.passphrase_file))


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(["graphs", "load", "files"]), help="All if absent.")
@grouped(graphs=TimedGraphOptions, load=ServedOptions)
@bench_out_option
@device_option
@json_option
def serving(
    parts: tuple[str, ...],
    graphs: TimedGraphOptions,
    load: ServedOptions,
    out: Path,
    device: str,
    json_path: Path | None,
) -> None:
    """Measure exported graphs and a running server.

    Graphs: agreement with PyTorch at 224 px, time over the plain logits graph, images a second over pytorch-grad-cam
    (pip install 'keyed-xai[bench]') and captum. Server: many clients at once on loopback; keyed PNG and JPEG files
    sent to it. Parts that are finished are kept in --out.

    \b
    keyed-xai bench serving
    keyed-xai bench serving --part graphs --device cuda          the same on a GPU, in float16
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.artifacts.documents import write_atomically
    from keyed_xai_benchmarks.serving_figures import render

    run = _plan(out, graphs, load, device)
    document = _run(run, parts or ("graphs", "load", "files"))
    table = render(document)
    write_atomically(out / "serving.md", table.encode())
    with after_writing(out):
        emit_json(document, schema="serving-figures", json_path=json_path)
        say(table, json_path=json_path)


def _plan(out: Path, graphs: TimedGraphOptions, load: ServedOptions, device: str) -> "ServingRun":
    from keyed_xai.outputs import prepare_folder
    from keyed_xai_benchmarks.serving import ServingSettings
    from keyed_xai_benchmarks.serving_figures import ServingRun
    from keyed_xai_benchmarks.serving_load import LoadSettings

    served = load.read()
    device = choose_device(device)
    prepare_folder(out)
    return ServingRun(
        folder=out,
        graphs=ServingSettings(
            images=graphs.images,
            repeats=graphs.repeats,
            batch=graphs.batch,
            threads=graphs.threads,
            device=device.partition(":")[0],
            precision=graphs.precision or ("fp32" if device == "cpu" else "fp16"),
        ),
        load=LoadSettings(load.clients, load.seconds, graphs.threads),
        architectures=graphs.architectures or _ARCHITECTURES,
        models=graphs.models,
        data=graphs.data,
        served=served,
        served_data=load.keyed_data,
    )


def _run(run: "ServingRun", parts: tuple[str, ...]) -> dict[str, Any]:
    from keyed_xai.reporting.bars import progress_bar
    from keyed_xai_benchmarks.serving_figures import measure

    with progress_bar() as progress:
        return measure(run, parts, progress=progress)
