"""Requests that wait for somebody: exactly that request, once, judged again when it is let go."""

from __future__ import annotations

import json

import pytest

from sidecar.policy import load_policy
from sidecar.session.commands import SessionLimits
from tests.support.http_play import ALICE, IDENTIFIED, TOKEN, C, Play, S

POLICY = """\
version: 1
rules:
  - {name: big-writes, when: {method: [PUT]}, approve: {by: [dba], within: 60s}}
"""
GET = b"GET /a HTTP/1.1\r\nHost: api.internal\r\n\r\n"
PUT = b'PUT /a?token=zz1 HTTP/1.1\r\nHost: api.internal\r\nContent-Length: 8\r\n\r\n{"a": 1}'
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def held(request: bytes = PUT, policy: str = POLICY, **more: object) -> Play:
    play = Play(policy, **more).client(request)  # type: ignore[arg-type]
    assert len(play.holds) == 1
    assert (play.to_server, play.to_client, play.opened) == (b"", b"", False)
    return play


def test_what_an_approver_sees() -> None:
    hold = held(principal=ALICE).holds[0]
    assert hold.summary == "PUT api.internal/a?token=[removed]"
    assert hold.parameters == ('{"a": 1}',)
    assert (hold.rule, hold.terms.by, hold.terms.within_s) == ("big-writes", ("dba",), 60.0)


def test_an_approval_lets_exactly_it_go_once() -> None:
    play = held(principal=ALICE, attachment=IDENTIFIED).decide("approved")
    assert play.to_server.endswith(b'\r\n\r\n{"a": 1}')
    assert play.to_server.count(TOKEN.encode()) == 1
    assert play.server(OK).to_client == OK
    play.client(PUT)
    assert len(play.holds) == 2
    assert play.to_server.count(b"PUT ") == 1
    assert play.holds[0].digest == play.holds[1].digest


def test_the_digest_covers_text_body_headers_and_principal() -> None:
    digests = {
        held(request, principal=principal).holds[0].digest
        for request in (PUT, PUT.replace(b'"a": 1', b'"a": 2'), PUT.replace(b"zz1", b"zz2"), PUT.replace(b"PUT", b"PUT"),
                        PUT.replace(b"Content-L", b"X: 1\r\nContent-L"))
        for principal in (None, ALICE)
    }  # fmt: skip
    assert len(digests) == 8


@pytest.mark.parametrize(
    ("outcome", "says"), [("rejected", "rejected by alice: no"), ("expired", "expired by alice: no")]
)
def test_a_refusal_is_a_denial_and_the_connection_stays(outcome: str, says: str) -> None:
    play = held().decide(outcome, reason="no")
    problem = json.loads(play.to_client.partition(b"\r\n\r\n")[2])
    assert problem["status"] == 403
    assert problem["detail"] == f"denied by policy: big-writes: {says}"
    assert not play.opened
    assert play.client(GET).server(OK).to_client.endswith(OK)
    assert play.to_server == GET


def test_a_policy_that_changed_meanwhile_counts() -> None:
    play = held()
    stricter = load_policy("version: 1\nrules: [{name: never, when: {method: [PUT]}, deny: at all}]\n", "p")
    play.do("engine_changed", stricter).decide("approved")
    assert b"denied by policy: never: at all" in play.to_client
    assert play.to_server == b""


def test_a_client_that_leaves_withdraws_it() -> None:
    play = held().do("eof", C)
    assert play.withdrawn == [play.holds[0].hold_id]
    assert play.closed == "client_closed"


def test_what_is_read_ahead_is_bounded_and_not_lost() -> None:
    play = held(limits=SessionLimits(held_max_bytes=100)).client(GET, GET)
    assert not play.paused
    play.client(GET * 2)
    assert play.paused
    play.decide("approved")
    assert not play.paused
    assert play.to_server.endswith(b'{"a": 1}' + GET * 4)


def test_earlier_answers_come_meanwhile() -> None:
    play = Play(POLICY).client(GET + PUT)
    assert play.to_server == GET
    assert play.server(OK).to_client == OK
    play.decide("approved")
    assert b"PUT " in play.to_server


def test_a_decision_on_another_hold_is_not_ours() -> None:
    play = held().do("hold_decided", "somebody else's", "approved", "alice", "")
    assert play.to_server == b""


def test_a_server_that_goes_away_meanwhile() -> None:
    play = Play(POLICY).client(GET).server(OK).client(PUT).do("eof", S)
    assert b"send it again" in play.to_client
    assert play.withdrawn == [play.holds[0].hold_id]


def test_a_chunked_body_is_read_whole_first() -> None:
    request = b"PUT /a HTTP/1.1\r\nHost: api.internal\r\nTransfer-Encoding: chunked\r\n\r\n"
    play = Play(POLICY).client(request, b"3\r\nabc\r\n")
    assert play.holds == []
    play.client(b"2\r\nde\r\n0\r\n\r\n").decide("approved")
    assert play.to_server.endswith(b"Content-Length: 5\r\n\r\nabcde")
    assert b"chunked" not in play.to_server


def test_a_body_over_the_limit_is_refused() -> None:
    play = Play(POLICY, limits=SessionLimits(held_max_bytes=5)).client(PUT)
    assert play.to_client.startswith(b"HTTP/1.1 403 ")
    assert (play.holds, play.to_server, play.closed) == ([], b"", "limit")


def test_a_body_that_waits_for_100_is_asked_for() -> None:
    play = Play(POLICY).client(PUT[:-8].replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
    assert play.to_client == b"HTTP/1.1 100 Continue\r\n\r\n"
    play.client(PUT[-8:]).decide("approved")
    assert b"xpect" not in play.to_server


def test_an_early_end_of_a_body_that_is_awaited() -> None:
    play = Play(POLICY).client(PUT[:-3]).do("eof", C)
    assert (play.closed, play.to_server) == ("client_closed", b"")
