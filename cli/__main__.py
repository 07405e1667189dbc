"""`python -m keyed_xai_cli`, for launchers that start modules."""

from keyed_xai_cli.main import main

if __name__ == "__main__":
    main(prog_name="keyed-xai")
