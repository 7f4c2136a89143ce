"""The command `sidecar`: the root group, one module a command group, loaded only when it is used.

Every SidecarError ends here: its message and hint go to stderr, its `exit_code` to the shell. Exit codes: 0
done, 1 the checked thing does not hold, 2 usage or configuration, 3 a prerequisite is missing; `exec` has the
command's own, and 125, 126, 127 as env(1). 130: interrupted.

Usage errors and what the system refuses (a file, a socket) end here as well, in the same two lines: whoever
reads them sees what failed, on which thing, and what to do, and never a traceback.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from typing import Any, Final

import click

from sidecar.cli import output
from sidecar.documents import nearest
from sidecar.errors import ConfigurationError, PrerequisiteError, SidecarError

NAMED_WRONGLY: Final = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells say it

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    # name -> (module:attribute, one line for the overview)
    "run": ("sidecar.cli.run:run", "The agent in the foreground: steering, inspector, audit."),
    "exec": ("sidecar.cli.exec:exec_", "Run one command steered; no agent needed."),
    "status": ("sidecar.cli.status:status", "What is running, and whether it is well."),
    "flows": ("sidecar.cli.flows:flows", "Live table of open flows."),
    "doctor": ("sidecar.cli.doctor:doctor", "Each prerequisite, with its fix."),
    "down": ("sidecar.cli.down:down", "Remove every kernel trace, also after a crash."),
    "policy": ("sidecar.cli.policy:policy", "Check, test and explain a policy."),
    "approvals": ("sidecar.cli.approvals:approvals", "Statements that wait for a decision."),
    "audit": ("sidecar.cli.audit:audit", "Follow, show, export and verify the records."),
    "why": ("sidecar.cli.why:why", "Why a statement or request was refused, and what to do."),
    "ca": ("sidecar.cli.ca:ca", "The local certificate authority."),
    "collector": ("sidecar.cli.collector:collector", "The upstream: ingest, store, web pages, API."),
}


class RootGroup(click.Group):
    """Imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = nearest(name, list(COMMANDS))
            raise ConfigurationError(
                f"there is no command `{name}`",
                hint=f"did you mean `sidecar {near}`?" if near else "sidecar --help",
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SidecarError as error:
            output.error(str(error), error.hint or _help(ctx))
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click's: the reader has gone
            what = f"{error.filename}: " if error.filename else ""
            denied = isinstance(error, PermissionError) and os.geteuid() != 0
            output.error(f"{what}{error.strerror or error}", "run it as root" if denied else _help(ctx))
            wrong = isinstance(error, NAMED_WRONGLY)
            ctx.exit(PrerequisiteError.exit_code if denied else ConfigurationError.exit_code if wrong else 1)


def _help(ctx: click.Context) -> str:
    return f"{ctx.command_path} {ctx.invoked_subcommand or ''}".rstrip() + " --help"


@click.group(cls=RootGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "--version", package_name="host-sidecar", message="sidecar %(version)s")
def cli() -> None:
    """Steers the connections of unchanged scripts into a local inspector that knows who connected, judges,
    masks and records."""
    logging.basicConfig(format="sidecar: %(levelname)s: %(message)s", level=logging.WARNING)


def main() -> None:
    """Entry point of the command `sidecar`."""
    try:
        status = cli.main(prog_name="sidecar", standalone_mode=False)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "sidecar"
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            output.note(error.format_message())
        else:
            output.error(error.format_message(), f"{path} --help")
        status = error.exit_code
    except click.ClickException as error:
        output.error(error.format_message(), "sidecar --help")
        status = error.exit_code
    except click.Abort:
        status = INTERRUPTED
    sys.exit(status)
