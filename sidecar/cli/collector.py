"""`sidecar collector`: the upstream, with its pages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidecar.errors import ConfigurationError

if TYPE_CHECKING:
    from sidecar.control.protocol import HoldView

DEFAULT_DATA = Path("/var/lib/sidecar/collector")


class AgentApprovals:
    """collector.approvals.ApprovalsGateway over the control sockets of this host's agents."""

    def __init__(self) -> None:
        from sidecar.control.client import Approvals

        self._approvals = Approvals()

    def list(self) -> Sequence[HoldView]:
        return sorted(self._approvals.views(), key=lambda view: (view.state != "pending", -view.opened_ns))

    def decide(self, hold_id: str, approve: bool, by: str, reason: str) -> Any:
        return self._approvals.decide_view(hold_id, approve, by=by, reason=reason)


_file = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option(
    "-c", "--config", "config_file", type=_file, help="Configuration: its upstream.token enrols hosts."
)
@click.option("--listen", default="127.0.0.1:8420", show_default=True, help="Address and port.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_DATA, show_default=True,
    help="Where records, keys and the page's token are kept.",
)  # fmt: skip
@click.option("--tls-cert", type=_file, help="PEM: certificate and chain. Needed beyond loopback.")
@click.option("--tls-key", type=_file, help="PEM: its key.")
@click.option(
    "--listen-fd", type=click.IntRange(3), hidden=True, help="A socket of `run`, which is our parent."
)
def collector(
    config_file: Path | None,
    listen: str,
    data: Path,
    tls_cert: Path | None,
    tls_key: Path | None,
    listen_fd: int | None,
) -> None:
    """The upstream: takes signed batches, stores them, answers with receipts; pages and API."""
    from sidecar.collector.app import Certificate, serve

    if (tls_cert is None) != (tls_key is None):
        raise ConfigurationError("--tls-cert and --tls-key belong together")
    enrolment = None
    if config_file is not None:
        from sidecar.config import load_config

        upstream = load_config(config_file).upstream
        enrolment = upstream.read_token() if upstream else None
    logging.getLogger().setLevel(logging.INFO)
    certificate = Certificate(tls_cert, tls_key) if tls_cert and tls_key else None
    serve(listen, data, AgentApprovals(), enrolment, certificate=certificate, listen_fd=listen_fd)
