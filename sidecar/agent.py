"""The composition root: the only module that wires kernel, attribution, identity, audit, control and workers together.

Runs as the supervisor, for `sidecar run` (steers a host) and for `sidecar exec` (steers one command). Start-up order is the
order of failing closed: policy, spool and workers stand before the first connection is steered; steering ends before they do.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import pwd
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop

from sidecar.agent_control import AgentControl
from sidecar.agent_recording import Recording
from sidecar.agent_steering import SteeringWatch
from sidecar.attribution.resolver import Resolver
from sidecar.audit.shipper import Shipper
from sidecar.audit.writer import segment_bytes
from sidecar.config import Config
from sidecar.control.protocol import socket_path
from sidecar.control.server import ControlServer
from sidecar.embedded_collector import EmbeddedCollector
from sidecar.errors import PrerequisiteError, SidecarError
from sidecar.identity.assertion import AssertionSigner
from sidecar.identity.service import IdentityService
from sidecar.kernel import cgroups, run_state
from sidecar.kernel.steering import SteeringPlan
from sidecar.launch import invoking_user, launch
from sidecar.model.flow import FlowFacts
from sidecar.model.secret import Secret
from sidecar.proxy import limits, link
from sidecar.proxy.holds import HoldDesk
from sidecar.proxy.listener import Listeners, open_listeners
from sidecar.proxy.policy_file import PolicySource
from sidecar.proxy.resolve import FlowResolver, Refusal
from sidecar.proxy.targets import REFRESH_S, NameBook
from sidecar.proxy.workers import WorkerHandle, WorkerPool
from sidecar.tls.authority import Authority

if TYPE_CHECKING:
    from sidecar.attribution.docker_engine import ContainerEngines

log = logging.getLogger("sidecar")

POLICY_POLL_S: Final = 0.5
ENGINES_S: Final = 2.0
"""What a container engine's list of networks is waited for at the start."""
MAX_WORKERS: Final = 4
WORKER_USER: Final = "sidecar"
NOBODY: Final = 65534
SETUP_FAILED: Final = 125


def worker_identity() -> tuple[int, int]:
    """uid and gid of workers: the user `sidecar` where it exists, else nobody."""
    try:
        account = pwd.getpwnam(WORKER_USER)
    except KeyError:
        return NOBODY, NOBODY
    return account.pw_uid, account.pw_gid


class Agent:
    """One instance. `start`, then `serve` or a command, then `stop`; `stop` is safe after a failed `start`."""

    def __init__(
        self,
        config: Config,
        *,
        mode: str,
        policy: Path | None = None,
        command: tuple[str, ...] = (),
        instance: str | None = None,
    ) -> None:
        self.config = config
        self.mode = mode
        self.command = command
        self.instance = instance or os.urandom(4).hex()
        self.started_ns = time.time_ns()
        self.host = socket.gethostname()
        self.names = NameBook()
        self.policy = PolicySource(
            policy or config.policy,
            hash_key=config.hash_key(),
            upstream=config.upstream is not None,
        )
        self.facts: dict[str, FlowFacts] = {}
        self.identity_counts = [0, 0, 0]
        """Flows with a verified principal, with a token that was refused, without a token."""
        self.recording = Recording(
            config.audit,
            self.host,
            spawn=self._task,
            block=self._block,
        )
        self.collector: EmbeddedCollector | None = None
        self.collector_address: str | None = None
        self.job_cgroup: Path | None = None
        self.shipper: Shipper | None = None
        self.pool: WorkerPool | None = None
        self.watch: SteeringWatch | None = None
        self.resolver: FlowResolver | None = None
        self._names_thread = concurrent.futures.ThreadPoolExecutor(1, "names")
        self._reader_thread = concurrent.futures.ThreadPoolExecutor(1, "reader")
        self._listeners: Listeners | None = None
        self._control: ControlServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._begun = False
        self.engines: ContainerEngines | None = None
        self.authority: Authority | None = None
        self.holds = HoldDesk(self.instance, self.recording.hold_decided)
        self.stopping = asyncio.Event()

    # -- life

    async def start(self) -> None:
        """Bring everything up, or raise a SidecarError; the caller then calls `stop`."""
        if os.geteuid() != 0:
            raise PrerequisiteError("steering needs root", hint="sudo sidecar " + self.mode)
        config = self.config
        self.policy.load()
        self.target_authorities = self.config.read_authorities()
        self._watch_names()
        loop = asyncio.get_running_loop()
        names = loop.run_in_executor(self._names_thread, self.names.refresh)
        await self._begin()
        inspector, job = cgroups.create(self.instance)
        cgroups.move(os.getpid(), inspector)
        if self.mode == "exec":
            self.job_cgroup = job
        await self.recording.open(f"{self.mode}, policy {self.policy.policy.revision}")
        count = 1 if self.mode == "exec" else min(MAX_WORKERS, os.cpu_count() or 1)
        steers_containers = self.mode == "run" and config.steering.containers
        self._listeners = open_listeners(count, everywhere=steers_containers)
        self.pool = WorkerPool(self, self._listeners.by_worker, *worker_identity())
        self.signer = AssertionSigner(self.recording.host_key.private_key, self.host)
        self.identity = IdentityService(config.identity)
        if config.opens_tls() or self.policy.policy.named_hosts:
            await asyncio.to_thread(self.open_authority)
        self._watch_containers()
        await self.pool.start()
        if self.engines is not None:
            await asyncio.to_thread(self.engines.wait, ENGINES_S)
        self.watch = SteeringWatch(
            SteeringPlan(
                instance=self.instance,
                scope_cgroups=(job,) if self.mode == "exec" else self._scope(),
                inspector_cgroup=inspector,
                exclusive=self.mode == "exec",
                ports=tuple(config.steering.ports),
                exclude=tuple(config.steering.exclude),
                listen_port=self._listeners.port,
                on_failure=config.steering.on_failure,
                foreign_netns=(
                    "refuse" if self.mode == "exec" else "steer" if steers_containers else "record"
                ),
                heartbeat_timeout_s=limits.HEARTBEAT_TIMEOUT_S,
                bridges=self.engines.bridges if self.engines else frozenset(),
            ),
            heard=self.pool.heard,
            gap=self.recording.gap,
        )
        self.resolver = FlowResolver(
            config, self.watch.steering, Resolver(self.engines), self.identity, self.names
        )
        try:
            async with asyncio.timeout(5):
                await names
        except TimeoutError:
            log.warning("names of targets and rules do not resolve yet; trying again every %.0f s", REFRESH_S)
        await self.watch.start()
        self._networks_changed()  # meanwhile, perhaps
        self._control = ControlServer(
            socket_path(self.instance), AgentControl(self), on_refusal=self.recording.control_refused
        )
        await self._control.start()
        self._start_shipping()
        for job_ in (
            self.watch.beat_forever,
            self.recording.commit_forever,
            self._watch_policy,
            self._watch_holds,
            self._refresh_names,
        ):
            self._tasks.append(asyncio.create_task(job_(), name=job_.__name__))

    def trust_variables(self, environ: Mapping[str, str]) -> dict[str, str]:
        """For a command with this environment, so that it accepts what the authority signs; empty where no TLS is opened. Raises
        OSError, TrustError."""
        if self.authority is None:
            return {}
        from sidecar.tls import environment

        directory = run_state.RUN_DIRECTORY / self.instance / run_state.TLS_DIRECTORY
        return environment.for_command(environ, self.authority.certificate_pem, directory)

    def _watch_containers(self) -> None:
        """An `exec` on a host without engines is spared the import of their library, which takes a tenth of a second."""
        addresses = self.config.attribution.engines
        if self.mode == "run" or any(Path(address.removeprefix("unix://")).exists() for address in addresses):
            from sidecar.attribution.docker_engine import ContainerEngines

            self.engines = ContainerEngines(addresses, self._networks_changed)
            self.engines.start()

    def _networks_changed(self) -> None:
        """Also called in a thread of an engine's watcher."""
        if self.watch is not None and self.engines is not None:
            self.watch.cover_bridges(self.engines.bridges)

    async def _begin(self) -> None:
        """Say who we are, before anything is made."""
        if self.mode == "exec":
            run_state.save(self.instance)
        else:
            await asyncio.to_thread(run_state.claim, self.instance, self._scope())
        self._begun = True

    def _scope(self) -> tuple[Path, ...]:
        """The cgroups that `run` steers. Raises PrerequisiteError where one is not there."""
        scope = self.config.steering.scope
        root = cgroups.cgroup2_mount()
        if scope.kind == "exec":
            return ()
        if scope.kind != "cgroups":
            return (root,)
        for path in scope.cgroups:
            if not (root / path.lstrip("/")).is_dir():
                raise PrerequisiteError(
                    f"there is no cgroup {path}",
                    hint=f"steering.scope names cgroups below {root}; systemctl start makes those of units",
                )
        return tuple(root / path.lstrip("/") for path in scope.cgroups)

    async def stop(self) -> None:
        """Undo everything, in the order of failing closed. A step that fails is logged and hinders no later one."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for step in (
            self._stop_flows, self._stop_steering, self._stop_listening, self._stop_recording, self._stop_collector,
            self._remove_traces,
        ):  # fmt: skip
            try:
                await step()
            except (SidecarError, OSError) as error:
                log.error("stopping, %s: %s", step.__name__.removeprefix("_").replace("_", " "), error)

    async def _stop_flows(self) -> None:
        if self.watch is not None:
            await self.watch.take_events()
        if self.pool is not None:
            await self.pool.stop(limits.DRAIN_S if self.mode == "run" else 0.5)

    async def _stop_steering(self) -> None:
        if self.watch is not None:
            await self.watch.close()

    async def _stop_listening(self) -> None:
        if self._control is not None:
            await self._control.close()
        if self._listeners is not None:
            self._listeners.close()
        if self.resolver is not None:
            self.resolver.close()
        if self.engines is not None:
            self.engines.stop()

    async def _stop_recording(self) -> None:
        await self.recording.close(self.mode, self._stop_shipping)

    async def _stop_shipping(self) -> None:
        if self.shipper is not None:
            await self.shipper.stop(flush_s=5.0)

    async def _stop_collector(self) -> None:
        if self.collector is not None:
            await self.collector.stop()

    async def _remove_traces(self) -> None:
        if self._begun:
            await asyncio.to_thread(cgroups.remove, self.instance)
            await asyncio.to_thread(run_state.end, self.instance)
        self.recording.end()
        for thread in (self._names_thread, self._reader_thread):
            thread.shutdown(wait=False, cancel_futures=True)

    def _start_shipping(self) -> None:
        assert self.recording.spool is not None
        upstream = self.config.upstream
        if upstream is not None:
            self.shipper = Shipper(self.recording.spool, upstream.url, upstream.read_token())
        elif self.mode == "run":
            data = self.config.audit.directory / "collector"
            self.collector = EmbeddedCollector(data, self._ship_to_collector)
            self.collector_address = self.collector.address
            self._tasks.append(asyncio.create_task(self.collector.serve(), name="collector"))
        if self.shipper is not None:
            self.shipper.start()

    def _ship_to_collector(self) -> None:
        assert self.recording.spool is not None
        if self.shipper is None:
            self.shipper = Shipper(self.recording.spool, f"{self.collector_address}", None)
            self.shipper.start()

    # -- periodic work

    def _block(self, reason: str) -> None:
        if self.pool is not None:
            self.pool.broadcast(link.Block(reason))

    async def _watch_policy(self) -> None:
        while True:
            await asyncio.sleep(POLICY_POLL_S)
            self.reload_policy(force=False)

    def reload_policy(self, *, force: bool = True) -> None:
        if self.policy.poll(force=force):
            assert self.pool is not None
            self.pool.broadcast(self.policy.message())
            self._watch_names()
            self.recording.agent("policy_changed", self.policy.policy.revision)

    async def _watch_holds(self) -> None:
        while True:
            self.holds.expire()
            await asyncio.sleep(0.25)

    def _watch_names(self) -> None:
        self.names.watch([*self.config.host_names(), *self.policy.policy.host_names])

    async def _refresh_names(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await asyncio.get_running_loop().run_in_executor(self._names_thread, self.names.refresh)

    @property
    def listen_port(self) -> int:
        return self._listeners.port if self._listeners else 0

    async def in_reader(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Reading records back is slow: a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._reader_thread, call, *arguments)

    # -- workers (proxy.workers.Owner)

    def worker_started(self, worker: WorkerHandle) -> None:
        audit = self.config.audit
        worker.send(
            link.Configure(
                host=self.host,
                sync_strict=audit.sync == "strict",
                on_full_drop=audit.on_full == "drop",
                segment_bytes=segment_bytes(audit.max_bytes),
                request_max_bytes=audit.requests.max_bytes,
                response_max_rows=audit.responses.max_rows,
                response_max_bytes=audit.responses.max_bytes,
                authorities=self.target_authorities,
            )
        )
        worker.send(self.policy.message())
        self._task(self._give_segment(worker, None))

    async def _give_segment(self, worker: WorkerHandle, rotate: str | None) -> None:
        handle = await self.recording.segment(worker.number, rotate)
        worker.stream = handle.stream
        worker.send(link.Segment(handle.stream, handle.head, handle.next_seq), (handle.fd,))
        if self.recording.blocked_reason and self.config.audit.on_full == "block":
            worker.send(link.Block(self.recording.blocked_reason))

    def _task(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.append(task)
        task.add_done_callback(lambda done: self._tasks.remove(done) if done in self._tasks else None)

    def worker_message(self, worker: WorkerHandle, message: Any) -> None:
        match message:
            case link.Resolve():
                self._task(self._resolve(worker, message))
            case link.FlowClosed():
                worker.flows.pop(message.flow, None)
                self.facts.pop(message.flow, None)
                self.holds.flow_ended(message.flow)
            case link.Sign():
                self._sign(worker, message)
            case link.MintLeaf():
                self._task(self._mint(worker, message))
            case link.HoldRequested():
                facts = self.facts.get(message.flow)
                if facts is None:
                    worker.send(link.HoldDecided(message.hold_id, "rejected", None, "the flow is not known"))
                else:
                    self.holds.requested(worker, message, facts)
                    log.info("held by %s: sidecar approvals approve %s", message.rule, message.hold_id[-8:])
            case link.HoldWithdrawn():
                self.holds.withdrawn(message)
            case link.NeedSegment():
                self._task(self._give_segment(worker, worker.stream))
            case link.ClientRequiresTls():
                facts = self.facts.get(message.flow)
                if facts is not None and self.resolver is not None:
                    self.resolver.remember_tls(facts)
            case link.AuditFailed():
                self.recording.fails(worker.number, message.detail)
                self.recording.update_block()
            case link.AuditRecovered():
                self.recording.works(worker.number)

    def worker_died(self, worker: WorkerHandle, detail: str) -> None:
        self.recording.works(worker.number)
        for flow in list(worker.flows):
            self.facts.pop(flow, None)
            self.holds.flow_ended(flow)
            self.recording.flow_lost(flow, detail)
        if worker.stream:
            stream, worker.stream = worker.stream, ""
            self._task(self.recording.close_stream(stream, "worker " + detail))

    async def _resolve(self, worker: WorkerHandle, message: link.Resolve) -> None:
        assert self.resolver is not None
        outcome = await self.resolver.resolve(message)
        if isinstance(outcome, Refusal):
            worker.send(link.Resolved(message.id, None, outcome.reason.value))
            self.recording.refused(outcome)
            return
        without = outcome.identity_error in (None, "no_token")
        self.identity_counts[0 if outcome.principal else 2 if without else 1] += 1
        self.facts[outcome.flow] = outcome
        worker.flows[outcome.flow] = None
        worker.send(link.Resolved(message.id, outcome))

    def _sign(self, worker: WorkerHandle, message: link.Sign) -> None:
        facts = self.facts.get(message.flow)
        assertion = None
        if facts is not None and facts.principal is not None:
            assertion = self.signer.sign(
                facts.principal,
                flow=message.flow,
                backend_pid=message.backend_pid,
                target=facts.target.name or facts.target.host,
                now_s=time.time(),
            )
        worker.send(link.Signed(message.id, assertion))

    def open_authority(self) -> Authority:
        """The local authority, made on the first use of TLS. Blocks. Raises TrustError."""
        if self.authority is None:
            authority = self.config.authority
            self.authority = Authority.open(
                authority.directory,
                lifetime_s=authority.lifetime_s,
                leaf_lifetime_s=authority.leaf_lifetime_s,
                permitted=authority.permitted,
            )
        return self.authority

    async def _mint(self, worker: WorkerHandle, message: link.MintLeaf) -> None:
        try:
            leaf = await asyncio.to_thread(lambda: self.open_authority().leaf(message.names))
        except (SidecarError, OSError) as error:
            log.error("no certificate for %s: %s", ", ".join(message.names), error)
            worker.send(link.LeafMinted(message.id, "", Secret(""), 0, str(error)))
            return
        worker.send(
            link.LeafMinted(
                message.id,
                leaf.certificate_chain_pem.decode("ascii"),
                Secret(leaf.key_pem.decode("ascii")),
                leaf.not_after_ns,
            )
        )

    async def run_until_stopped(self) -> None:
        await self.stopping.wait()


async def _run(agent: Agent, ready: Callable[[], Any] | None = None) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stopping.set)
    loop.add_signal_handler(signal.SIGHUP, agent.reload_policy)
    try:
        await agent.start()
        if ready is None:
            log.info("instance %s runs; look at it with `sidecar status`, end it with Ctrl-C", agent.instance)
            await agent.run_until_stopped()
            return 0
        return int(await ready())
    finally:
        await agent.stop()


def run_agent(config: Config) -> int:
    """`sidecar run`: until SIGTERM or SIGINT; SIGHUP reloads the policy. Returns the exit status."""

    async def main() -> int:
        agent = Agent(config, mode="run")
        return await _run(agent)

    return int(uvloop.run(main()))


def run_exec(config: Config, argv: list[str], policy: Path | None, instance: str) -> int:
    """`sidecar exec`, as `instance`: returns the command's exit status. Raises SidecarError where steering could not be set up."""

    async def main() -> int:
        agent = Agent(config, mode="exec", policy=policy, command=tuple(argv), instance=instance)

        async def command() -> int:
            assert agent.job_cgroup is not None
            user = invoking_user()
            running = asyncio.create_task(
                launch(
                    argv,
                    job_cgroup=agent.job_cgroup,
                    user=user,
                    extra_env={"PGCHANNELBINDING": "disable"},
                    replaced_env=agent.trust_variables(user.environ),
                )
            )
            stop = asyncio.create_task(agent.stopping.wait())
            await asyncio.wait({running, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                return 128 + signal.SIGTERM
            stop.cancel()
            return running.result()

        return await _run(agent, command)

    return int(uvloop.run(main()))
