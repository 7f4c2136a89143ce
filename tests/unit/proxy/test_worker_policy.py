"""A worker judges by the clock: what an `until` exempted is judged again from that instant on, also in open flows."""

from __future__ import annotations

import asyncio
import datetime
import socket

from sidecar.model.flow import Address, FlowFacts, Target
from sidecar.model.operation import SqlOperation
from sidecar.model.verdict import Action
from sidecar.model.workload import Workload
from sidecar.policy import builtin_policy
from sidecar.proxy import link
from sidecar.proxy.policy_file import PolicySource
from sidecar.proxy.worker import Worker

TARGET = Target(Address("10.0.0.1", 5432), "db.internal", "target", "postgres", ("db.internal",))
DROP = SqlOperation("query", "DROP TABLE t", "shop", "app")
OPENED_NS = 1
"""Long ago: a flow's age must not decide."""


def document(until: datetime.datetime) -> str:
    return (
        "version: 1\nrules:\n"
        "  - name: never\n    when: {statement: DROP}\n    deny: x\n"
        f"    except: [{{name: e, when: {{table: t}}, until: '{until.isoformat()}'}}]\n"
    )


def facts() -> FlowFacts:
    return FlowFacts("f", OPENED_NS, Address("127.0.0.1", 1), TARGET, None, Workload())


class OpenFlow:
    """Stands where a flow's driver stands: counts how often it is told that decisions it keeps are void."""

    requests = denied = bytes_client = bytes_server = 0
    protocol, blocked = "postgres", False

    def __init__(self) -> None:
        self.told = 0
        self.holds: dict[str, object] = {}

    def engine_changed(self) -> None:
        self.told += 1


def test_an_until_ends_at_its_instant_in_a_running_worker() -> None:
    async def run() -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with near, far:
            far.setblocking(False)
            worker = Worker(near, [])
            flow = OpenFlow()
            worker.flows["f"] = flow  # type: ignore[assignment]
            until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
            worker._on_message(link.PolicyText(document(until), "policy.yaml", "r"), [])
            assert flow.told == 1
            assert worker.engine.evaluate(DROP, facts()).action is Action.ALLOW
            for _ in range(40):
                await asyncio.sleep(0.1)
                if flow.told == 2:
                    break
            assert flow.told == 2
            assert datetime.datetime.now(datetime.UTC) >= until
            assert worker.engine.evaluate(DROP, facts()).action is Action.DENY
            worker.engine = builtin_policy()
            await asyncio.sleep(0)

    asyncio.run(run())


def test_the_supervisor_judges_by_the_clock_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    path = tmp_path / "policy.yaml"
    path.write_text(document(yesterday))
    source = PolicySource(path, hash_key=None, upstream=False)
    source.load()
    assert source.policy.evaluate(DROP, facts()).action is Action.DENY
