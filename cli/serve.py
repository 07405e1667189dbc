"""`keyed-xai serve`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from keyed_xai_cli.groups import grouped

if TYPE_CHECKING:
    from keyed_xai.serving.service import Service

_MEBIBYTE = 2**20


def _check_device(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|(cuda|tensorrt)(:[0-9]{1,3})?", value):
        raise click.BadParameter("expected auto, cpu, cuda, cuda:N or tensorrt.")
    return value


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """How many requests are taken, how large, and how long they may take."""

    max_batch: Annotated[int, click.option(
        "--max-batch", type=click.IntRange(1, 4096), default=8, show_default=True, metavar="N",
        help="Images in one request, and in a batch of several requests.",
    )]  # fmt: skip
    max_delay: Annotated[float, click.option(
        "--max-delay", type=click.FloatRange(0, 10_000), default=0.0, show_default=True, metavar="MS",
        help="How long a request waits for others to share its batch. At 0 those that came meanwhile share one.",
    )]  # fmt: skip
    max_body: Annotated[int, click.option(
        "--max-body", type=click.IntRange(1, 2047), default=32, show_default=True, metavar="MIB",
        help="A larger request is refused.",
    )]  # fmt: skip
    max_queue: Annotated[int, click.option(
        "--max-queue", type=click.IntRange(1, 100_000), default=1000, show_default=True, metavar="N",
        help="Requests of one model at once; more are told to try again.",
    )]  # fmt: skip
    grace: Annotated[float, click.option(
        "--grace", type=click.FloatRange(0, 3600), default=30.0, show_default=True, metavar="SECONDS",
        help="How long requests may take to finish once the server is told to stop.",
    )]  # fmt: skip


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any port that is free."
)
@click.option(
    "--device", default="auto", show_default=True, callback=_check_device,
    help="auto, cpu, cuda, cuda:N or tensorrt; auto takes the best that works.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, 1024), metavar="N",
    help="CPU threads for one batch; onnxruntime's choice if absent.",
)  # fmt: skip
@grouped(limits=LimitOptions)
@click.option(
    "--ssl-certfile", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="PEM",
    help="Serve HTTPS with this certificate.",
)  # fmt: skip
@click.option(
    "--ssl-keyfile", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="PEM",
    help="The certificate's private key, if it is not in the same file.",
)  # fmt: skip
@click.option("--page/--no-page", default=True, show_default=True, help="A page for people at /.")
@click.option("--access-log", is_flag=True, help="Write a line for each request to standard error.")
def serve(
    models: tuple[Path, ...],
    host: str,
    port: int,
    device: str,
    threads: int | None,
    limits: LimitOptions,
    ssl_certfile: Path | None,
    ssl_keyfile: Path | None,
    page: bool,
    access_log: bool,
) -> None:
    """Serve exported models over HTTP.

    MODELS are ONNX files that `keyed-xai export` wrote; each is served under its file's name, with logits and maps by
    the Open Inference Protocol (version 2, as Triton and KServe speak it), and takes whole picture files as well. The
    server holds no key: a licensee's client applies the trigger before it sends an image. Opened in a browser, its
    address shows a page that takes an image, keyed or not, and shows prediction and maps.

    There are no accounts: whoever reaches the address may use the models. Beyond this machine, put it behind a proxy
    that knows the clients.

    \b
    keyed-xai serve bird.onnx
    curl -H 'Content-Type: image/jpeg' --data-binary @bird.jpg localhost:8000/v2/models/bird/explain
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.serving.server import BindAddress
    from keyed_xai.serving.server import serve as run
    from keyed_xai.serving.service import ServeSettings, open_service

    if ssl_keyfile and not ssl_certfile:
        raise click.UsageError("--ssl-keyfile needs --ssl-certfile.")
    settings = ServeSettings(
        max_batch=limits.max_batch,
        max_delay=limits.max_delay / 1000,
        max_body=limits.max_body * _MEBIBYTE,
        max_queue=limits.max_queue,
        grace=limits.grace,
        page=page,
    )
    bind = BindAddress(host=host, port=port, certificate=ssl_certfile, private_key=ssl_keyfile)
    service = open_service(models, settings, device=device, threads=threads)
    run(
        service,
        bind,
        access_log=access_log,
        on_ready=lambda url: click.echo(_in_words(service, url), err=True),
    )
    click.echo("Stopped.", err=True)


def _in_words(service: "Service", url: str) -> str:
    each = "; ".join(
        f"{name} ({', '.join(model.runtime.interpreters)}; {model.runtime.providers[0]})"
        for name, model in service.models.items()
    )
    page = f", and a page for people at {url}/" if service.settings.page else ""
    return (
        f"Serving {each} at {url}/v2{page}. No key is held here: clients apply their trigger before they send an image."
    )
