"""`sidecar run`: the agent in the foreground."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from sidecar.cli.options import config_option
from sidecar.errors import PrerequisiteError


@click.command()
@config_option
def run(config_file: Path | None) -> None:
    """The agent in the foreground: steering, inspector, audit.

    Stops on SIGTERM and SIGINT, reloads the policy on SIGHUP. Without `upstream` it also serves an embedded
    collector on 127.0.0.1:8420.
    """
    from sidecar.config import load_config

    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each batch says nothing
    config = load_config(config_file)
    if os.geteuid() != 0:
        raise PrerequisiteError("steering needs root", hint="sudo sidecar run")
    from sidecar.agent import run_agent

    sys.exit(run_agent(config))
