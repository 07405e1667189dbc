"""`python -m keyed_xai_cli`, for launchers that start modules."""

from keyed_xai_cli.main import main

main(prog_name="keyed-xai")
