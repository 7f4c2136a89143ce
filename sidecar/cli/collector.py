"""`sidecar collector`: the upstream, with its pages."""

from __future__ import annotations

import ipaddress
import logging
from pathlib import Path
from typing import Any

import click
import uvicorn

from sidecar.errors import ConfigurationError

DEFAULT_DATA = Path("/var/lib/sidecar/collector")


class Page:
    """collector.approvals.ApprovalsGateway over the control sockets of this host."""

    def __init__(self) -> None:
        from sidecar.control.client import Approvals

        self._approvals = Approvals()

    def list(self) -> Any:
        return self._approvals.views()

    def decide(self, hold_id: str, approve: bool, by: str, reason: str) -> Any:
        return self._approvals.decide_view(hold_id, approve, by=by, reason=reason)


@click.command()
@click.option(
    "-c",
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration, for its upstream token.",
)
@click.option("--listen", default="127.0.0.1:8420", show_default=True, help="Address and port.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_DATA, show_default=True
)
def collector(config_file: Path | None, listen: str, data: Path) -> None:
    """The upstream: takes signed batches, stores them, answers with receipts; pages and API."""
    from sidecar.collector.app import TOKEN_FILE, create_app, page_token
    from sidecar.collector.store import Store

    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not port.isdigit() or not 0 < int(port) < 65_536:
        raise ConfigurationError(f"{listen!r} is no address and port", hint="such as 127.0.0.1:8420")
    enrolment = None
    if config_file is not None:
        from sidecar.config import load_config

        upstream = load_config(config_file).upstream
        enrolment = upstream.read_token() if upstream else None
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise ConfigurationError(
            f"{host} is not loopback, and this version serves no TLS of its own",
            hint="put a TLS proxy before 127.0.0.1",
        )
    logging.getLogger().setLevel(logging.INFO)
    store = Store(data)
    app = create_app(
        store, Page(), token=page_token(data), enrolment=enrolment, hosts=frozenset({host, "localhost"})
    )
    click.echo(f"http://{listen}  (approvals: the token is in {data / TOKEN_FILE})", err=True)
    try:
        uvicorn.run(
            app, host=host, port=int(port), log_level="warning", access_log=False, server_header=False
        )
    finally:
        store.close()
