"""The command group, and the one place where errors become text and exit codes.

0 done or shown, 1 error, 2 usage, 3 not shown, 130 interrupted. A command that has not shown what it was asked to show
ends with `ctx.exit(NOT_SHOWN)`.
"""

import errno
import importlib
import os
from collections.abc import MutableMapping

import click

from keyed_xai import __version__
from keyed_xai.errors import KeyedXAIError

ERROR = 1
NOT_SHOWN = 3
INTERRUPTED = 130
SPIN_COUNT = "1000"
"""Turns, some microseconds, for which a thread of GNU OpenMP waits before it sleeps."""

COMMANDS = {
    "keygen": ("keyed_xai_cli.keygen:keygen", "Make an owner key."),
    "train": ("keyed_xai_cli.train:train", "Fit a reference model to labelled data."),
    "protect": ("keyed_xai_cli.protect:protect", "Make a model whose saliency maps need a key."),
    "explain": ("keyed_xai_cli.explain:explain", "Write the saliency maps of images."),
    "verify": ("keyed_xai_cli.verify:verify", "Test whether a model was protected with a key."),
    "inspect": ("keyed_xai_cli.inspect:inspect", "Print and check a card and licence."),
    "export": ("keyed_xai_cli.export:export", "Write a model and its maps as one ONNX file."),
    "serve": ("keyed_xai_cli.serve:serve", "Serve exported models over HTTP."),
    "attack": ("keyed_xai_cli.attack:attack", "Backdoor a model's explanations, as threat evaluation."),
    "audit": ("keyed_xai_cli.audit:audit", "Run defences and removal attacks on a model."),
    "bench": ("keyed_xai_cli.bench:bench", "Make the project's figures again."),
    "demo": ("keyed_xai_cli.demo:demo", "Run the main job on images that come with the package."),
}
"""Where each command is, and its line in the overview: a command's module is loaded only when the command is used."""


class LazyGroup(click.Group):
    """A group that shows its overview without loading any command, and turns errors into exit codes."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Return the commands in the order in which they are used."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names, loaded."""
        name, placeholder, rest = super().resolve_command(ctx, args)
        if name is None or placeholder is None:
            return name, placeholder, rest
        return name, _load(name), rest

    def invoke(self, ctx: click.Context) -> object:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyedXAIError as error:
            raise click.ClickException(_one_line(str(error), error)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe has left: click ends quietly
                raise
            raise click.ClickException(_one_line(_describe(error), error)) from error


def _load(name: str) -> click.Command:
    module, attribute = COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), attribute)
    if not isinstance(command, click.Command):
        raise TypeError(f"{COMMANDS[name][0]} is not a click command.")
    return command


def _describe(error: OSError) -> str:
    where = f": {error.filename}" if error.filename is not None else ""
    return f"{error.strerror or type(error).__name__}{where}."


def _one_line(message: str, error: Exception) -> str:
    """Return a message and the error's notes without control characters."""
    message = " ".join([message, *getattr(error, "__notes__", ())])
    return " ".join("".join(letter if letter.isprintable() else " " for letter in message).split())


@click.group(
    cls=LazyGroup,
    commands={name: click.Command(name, short_help=line) for name, (_, line) in COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="keyed-xai")
def main() -> None:
    """License the saliency maps of an image classifier, and prove that it is yours, with a key.

    \b
    A first look:      keyed-xai demo
    Your own model:    keyed-xai keygen -o k.pem
                       keyed-xai protect model.pt --key-file k.pem
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    share_cores(os.environ)


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Have PyTorch's threads wait for each other asleep, after a moment, unless the user has said how they wait.

    OpenMP's threads spin for milliseconds by default: where another program is at work too, they take the time from
    each other. Must be said before PyTorch is loaded; `benchmarks/spinning.py` measures what it is worth.
    """
    if environment.keys().isdisjoint({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}):
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT
