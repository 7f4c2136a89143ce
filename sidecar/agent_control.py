"""What the agent answers on its control socket (control.protocol.ControlApi). Reads the agent's state; changes nothing itself."""

from __future__ import annotations

import os
from importlib import metadata
from typing import TYPE_CHECKING, Any

from sidecar.approvals.grants import Decider
from sidecar.audit.read import find_record
from sidecar.control.protocol import (
    FlowRow,
    HoldView,
    IdentityStatus,
    PolicyStatus,
    ShippingStatus,
    SpoolStatus,
    Status,
    SteeringStatus,
    WorkerStatus,
)
from sidecar.model.origin import Origin

if TYPE_CHECKING:
    from sidecar.agent import Agent

DISTRIBUTION = "host-sidecar"


def version() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


class AgentControl:
    """Implements ControlApi."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def status(self) -> Status:
        agent = self._agent
        config = agent.config
        policy = agent.policy.state()
        rules = agent.policy.policy.rules
        watch = agent.watch
        spool = agent.recording.state()
        pool = agent.pool.workers if agent.pool else []
        scope = config.steering.scope
        shipping = agent.shipper.state() if agent.shipper else None
        failing = agent.collector.error if agent.collector else None
        return Status(
            instance=agent.instance,
            pid=os.getpid(),
            version=version(),
            mode=agent.mode,
            started_ns=agent.started_ns,
            scope=("exec",) if agent.mode == "exec" else scope.cgroups or (scope.kind,),
            ports=dict(config.steering.ports),
            policy=PolicyStatus(
                file=policy.file,
                revision=policy.revision,
                loaded_ns=policy.loaded_ns,
                error=policy.error,
                rules=sum(not rule.observe for rule in rules),
                observing=sum(rule.observe for rule in rules),
            ),
            workers=tuple(
                WorkerStatus(
                    pid=worker.pid,
                    flows=worker.open_flows,
                    restarts=worker.restarts,
                    rss_bytes=worker.rss_bytes(),
                )
                for worker in pool
            ),
            spool=SpoolStatus(
                ok=not agent.recording.blocked_reason,
                blocked_reason=agent.recording.blocked_reason or None,
                dropping=agent.config.audit.on_full == "drop",
                used_bytes=spool.used_bytes if spool else 0,
                unshipped_bytes=spool.unshipped_bytes if spool else 0,
                directory=str(config.audit.directory),
            ),
            shipping=ShippingStatus(
                url=shipping.url,
                ok=shipping.ok and not failing,
                error=failing or shipping.error,
                shipped_batches=shipping.batches,
                last_receipt_ns=shipping.last_receipt_ns,
            )
            if shipping
            else ShippingStatus(ok=not failing, error=failing),
            steering=SteeringStatus(
                ok=bool(agent.pool and agent.pool.healthy),
                on_failure=config.steering.on_failure,
                listen_port=agent.listen_port,
                drifts=tuple(watch.drifts) if watch else (),
                drift_count=watch.drift_count if watch else 0,
                refused=watch.refused if watch else 0,
            ),
            identity=IdentityStatus(
                required=config.identity.required,
                issuers=tuple(issuer.issuer for issuer in config.identity.issuers),
                verified=agent.identity_counts[0],
                failed=agent.identity_counts[1],
                absent=agent.identity_counts[2],
                error="; ".join(agent.identity.problems()) or None,
            ),
            gaps=dict(agent.recording.gaps),
            limitations=(*config.limitations(), *(agent.engines.problems() if agent.engines else ())),
            flows=len(agent.facts),
            holds=agent.holds.pending,
            command=agent.command,
            collector=agent.collector_address,
        )

    async def flows(self) -> list[FlowRow]:
        agent = self._agent
        rows = []
        for worker in agent.pool.workers if agent.pool else []:
            for flow, stat in worker.flows.items():
                facts = agent.facts.get(flow)
                if facts is None:
                    continue
                origin = facts.origin
                rows.append(
                    FlowRow(
                        flow=flow,
                        opened_ns=facts.opened_ns,
                        pid=origin.tgid if origin else 0,
                        exe=(origin.exe or origin.comm) if origin else "",
                        uid=origin.uid if origin else 0,
                        principal=facts.principal.subject if facts.principal else "",
                        target=f"{facts.target.name or facts.target.host}:{facts.target.address.port}",
                        protocol=stat.protocol if stat else facts.target.protocol,
                        requests=stat.requests if stat else 0,
                        denied=stat.denied if stat else 0,
                        bytes_up=stat.bytes_client if stat else 0,
                        bytes_down=stat.bytes_server if stat else 0,
                        state=stat.state if stat else "open",
                    )
                )
        return rows

    async def holds(self) -> list[HoldView]:
        return self._agent.holds.views()

    async def hold(self, hold_id: str) -> HoldView | None:
        return self._agent.holds.view(hold_id)

    async def decide(self, hold_id: str, approve: bool, by: Decider, reason: str) -> HoldView:
        return self._agent.holds.decide(hold_id, approve, by, reason)

    async def why(self, record_id: str, peer_uid: int) -> dict[str, Any] | None:
        found = await self._agent.in_reader(find_record, self._agent.config.audit.directory, record_id)
        return found.joined() if found else None

    async def reload(self) -> None:
        self._agent.reload_policy()

    async def stop(self) -> None:
        self._agent.stopping.set()

    def is_steered(self, pid: int, cgroup: str) -> bool:
        parts = cgroup.strip("/").split("/")
        return len(parts) >= 3 and parts[0] == "sidecar" and parts[2] == "job"

    def held_origin(self, hold_id: str) -> Origin | None:
        return self._agent.holds.origin(hold_id)
