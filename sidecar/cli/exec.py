"""`sidecar exec`: one command, steered, as if it were not wrapped."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from sidecar import launch
from sidecar.cli import output
from sidecar.cli.options import config_option
from sidecar.errors import ConfigurationError, PrerequisiteError, SidecarError
from sidecar.front import SETUP_FAILED


@click.command("exec", context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@config_option
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Policy, instead of the one that the configuration names.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD…")
def exec_(config_file: Path | None, policy_file: Path | None, command: tuple[str, ...]) -> None:
    """Run one command steered, no agent needed.

    Exit status, stdin, terminal and signals are the command's. Everything is undone afterwards; processes
    that the command leaves in the background are ended with it. 125: steering could not be set up; 126, 127:
    the command could not be run.
    """
    try:
        if os.geteuid() != 0:
            raise PrerequisiteError("steering needs root", hint="sudo sidecar exec -- CMD…")
        instance = os.urandom(4).hex()
        status = launch.split(instance)
        if status is not None:
            sys.exit(status)
        from sidecar.config import load_config

        config = load_config(config_file)
        from sidecar.agent import run_exec

        sys.exit(run_exec(config, list(command), policy_file, instance))
    except ConfigurationError:
        raise
    except SidecarError as error:
        output.error(str(error), error.hint or "`sidecar doctor`, with the same -c, says what is missing")
        sys.exit(SETUP_FAILED)
