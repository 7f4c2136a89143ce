"""HTTP/1.1 on paper: what a client sends, what the server gets, what comes back, what is written."""

from __future__ import annotations

import json

import pytest

from sidecar.model.principal import Attachment
from sidecar.model.reasons import CloseReason
from sidecar.session.commands import Send, SessionLimits, WriteRecord
from tests.support.http_play import ALICE, IDENTIFIED, TOKEN, C, Play, S

HOST = b"Host: api.internal\r\n"
GET = b"GET /a HTTP/1.1\r\n" + HOST + b"\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
NO_DELETE = """\
version: 1
rules:
  - {name: no-delete, when: {protocol: http, method: [DELETE]}, deny: not by a job}
"""
DELETE = b"DELETE /a HTTP/1.1\r\n" + HOST + b"\r\n"


def post(*headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"POST /a HTTP/1.1", HOST[:-2], *headers, b"", body])


# -- what passes, passes untouched


def test_a_request_and_its_response_are_the_bytes_that_came() -> None:
    play = Play().client(GET).server(OK)
    assert (play.to_server, play.to_client) == (GET, OK)
    assert [record.kind for record in play.records] == ["open", "request", "response"]
    assert play.closed is None


def test_the_record_stands_before_the_bytes() -> None:
    play = Play().client(GET)
    kinds = [type(command) for command in play.commands]
    assert kinds.index(Send) > max(index for index, kind in enumerate(kinds) if kind is WriteRecord)


def test_pipelined_requests_are_answered_in_order() -> None:
    play = Play(NO_DELETE).client(GET + DELETE + GET)
    assert play.to_server == GET * 2
    play.server(OK)
    first, _, rest = play.to_client.partition(b"hi")
    assert first + b"hi" == OK
    assert rest.startswith(b"HTTP/1.1 403 ")
    play.server(OK)
    assert play.to_client.endswith(OK)
    assert play.closed is None


def test_more_pipelined_requests_than_fit_wait_for_answers() -> None:
    play = Play().client(GET * 400)
    assert play.to_server == GET * 256
    play.server(OK * 256)
    assert play.to_server == GET * 400
    play.server(OK * 144)
    assert play.to_client == OK * 400


def test_chunks_extensions_and_trailers_pass_as_they_are() -> None:
    body = b'5;name="a b"\r\nhello\r\n0A\r\n0123456789\r\n0\r\nX-Sum: 1\r\n\r\n'
    request = post(b"Transfer-Encoding: chunked", b"Trailer: X-Sum", body=body)
    response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    play = Play().client(request + GET).server(response)
    assert (play.to_server, play.to_client) == (request + GET, response)
    record = play.of_kind("response")[0]
    assert record.operation is not None
    assert (record.operation.body, record.operation.body_bytes) == ("hello0123456789", 15)
    assert record.response is not None
    assert (record.response.body, record.response.bytes) == ("hello0123456789", 15)


def test_a_body_in_a_later_packet_of_a_request_that_closes() -> None:
    head, body = post(b"Connection: close", b"Content-Length: 4"), b"body"
    play = Play().client(head, b"bo", b"dy")
    assert play.to_server == head + body
    assert play.server(b"HTTP/1.1 200 OK\r\n\r\n", b"until the end").do("eof", S).closed
    assert play.to_client.endswith(b"until the end")


def test_nothing_after_a_last_request_is_read() -> None:
    last = b"GET /a HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    play = Play().client(last + GET).client(GET)
    assert play.to_server == last
    assert play.server(OK).closed == "client_closed"


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 12\r\n\r\n",
    ],
)
def test_responses_without_a_body(response: bytes) -> None:
    play = Play().client(GET + GET).server(response + OK)
    assert play.to_client == response + OK


def test_head_has_no_body_whatever_its_length_says() -> None:
    head = b"HEAD /a HTTP/1.1\r\n" + HOST + b"\r\n"
    play = Play().client(head + GET).server(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + OK)
    assert play.to_client.endswith(OK)
    assert len(play.of_kind("response")) == 2


def test_interim_responses_pass() -> None:
    play = Play().client(post(b"Expect: 100-continue", b"Content-Length: 2"))
    play.server(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n").client(
        b"hi"
    ).server(OK)
    assert play.to_server.endswith(b"\r\n\r\nhi")
    assert play.to_client.endswith(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
    assert len(play.of_kind("response")) == 1


def test_an_early_response_does_not_stop_the_body() -> None:
    play = Play().client(post(b"Content-Length: 8"), b"1234").server(OK).client(b"5678" + GET).server(OK)
    assert play.to_server.endswith(b"12345678" + GET)
    record = play.of_kind("response")[0]
    assert record.operation is not None
    assert record.operation.truncated
    assert play.closed is None


def test_http_1_0_ends_with_its_answer() -> None:
    play = Play().client(b"GET /a HTTP/1.0\r\n\r\n").server(OK)
    assert (play.to_client, play.closed) == (OK, "client_closed")


def test_unknown_methods_are_passed_and_judged() -> None:
    policy = "version: 1\nrules: [{name: n, when: {method: [FROBNICATE]}, deny: n}]\n"
    request = b"FROBNICATE /a HTTP/1.1\r\n" + HOST + b"\r\n"
    assert Play().client(request).to_server == request
    play = Play(policy).client(request)
    assert play.to_server == b""
    assert play.to_client.startswith(b"HTTP/1.1 403 ")


def test_empty_lines_before_a_request_are_dropped() -> None:
    assert Play().client(b"\r\n\r\n" + GET + b"\r\n" + GET).to_server == GET * 2


# -- half-close


def test_a_client_that_half_closes_still_gets_its_answer() -> None:
    play = Play().client(GET).do("eof", C)
    assert play.half_closed == [S]
    assert play.server(OK).closed == "client_closed"
    assert play.to_client == OK


def test_half_close_waits_for_the_upstream_connection() -> None:
    play = Play(connects=False).client(GET).do("eof", C)
    assert play.half_closed == []
    play.do("upstream_connected")
    assert (play.to_server, play.half_closed) == (GET, [S])


def test_half_close_waits_for_what_was_read_ahead() -> None:
    play = Play().client(GET * 300).do("eof", C)
    assert play.half_closed == []
    play.server(OK * 256)
    assert (play.to_server, play.half_closed) == (GET * 300, [S])
    assert play.server(OK * 44).closed == "client_closed"


def test_a_server_that_goes_away_in_a_body() -> None:
    play = Play().client(GET).server(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf").do("eof", S)
    assert play.closed == "server_closed"
    record = play.of_kind("response")[0]
    assert record.response is not None
    assert record.response.error == {"message": "the connection ended before the answer was whole"}
    assert record.response.status == 200


# -- upgrades

UPGRADE = b"GET /ws HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


def test_an_upgrade_is_relayed_and_recorded() -> None:
    play = Play().client(UPGRADE).server(SWITCH + b"\x81\x02hi").client(b"\x81\x80mask")
    assert play.to_server == UPGRADE + b"\x81\x80mask"
    assert play.to_client == SWITCH + b"\x81\x02hi"
    assert [record.kind for record in play.records] == ["open", "request", "response", "gap"]
    play.do("eof", C)
    assert (play.half_closed, play.closed) == ([S], None)
    assert play.server(b"bye").do("eof", S).closed == "server_closed"
    assert play.to_client.endswith(b"bye")


def test_what_follows_an_upgrade_waits_for_the_answer() -> None:
    play = Play(NO_DELETE).client(UPGRADE + DELETE)
    assert play.to_server == UPGRADE
    play.server(OK)
    assert play.to_client.startswith(OK + b"HTTP/1.1 403")
    assert play.to_server == UPGRADE


def test_an_upgrade_that_nobody_asked_for_is_refused() -> None:
    play = Play().client(GET).server(SWITCH)
    assert play.closed == "protocol_error"
    assert play.to_client.startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("token", [b"h2c", b"H2C", b"TLS/1.0"])
def test_upgrades_that_would_hide_requests_are_taken_out(token: bytes) -> None:
    request = (
        b"GET /a HTTP/1.1\r\n" + HOST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + token
        + b"\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    )  # fmt: skip
    play = Play().client(request + GET)
    assert play.to_server == GET * 2


def test_a_tunnel_is_judged_then_relayed() -> None:
    request = b"CONNECT db.internal:5432 HTTP/1.1\r\nHost: db.internal:5432\r\n\r\n"
    play = Play().client(request).server(b"HTTP/1.1 200 OK\r\n\r\n").client(b"\0raw")
    assert play.to_server == request + b"\0raw"
    operation = play.of_kind("request")[0].operation
    assert operation is not None
    assert operation.method == "CONNECT"
    policy = "version: 1\nrules: [{name: n, when: {host: db.internal}, deny: n}]\n"
    assert Play(policy, host="proxy.internal").client(request).to_server == b""


# -- refusals


def test_a_denial_keeps_the_connection() -> None:
    play = Play(NO_DELETE).client(b"DELETE /a HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc" + GET)
    head, _, rest = play.to_client.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/problem+json")
    problem = json.loads(rest)
    assert problem["detail"] == "denied by policy: no-delete: not by a job"
    assert problem["rule"] == "no-delete"
    assert problem["hint"] == f"sidecar why {problem['record']}"
    assert play.records[1].id.endswith(problem["record"])
    assert play.to_server == GET
    assert play.server(OK).to_client.endswith(OK)


def test_a_denied_request_opens_no_upstream_connection() -> None:
    assert not Play(NO_DELETE).client(DELETE).opened


def test_a_denied_head_has_no_body() -> None:
    policy = "version: 1\nrules: [{name: n, when: {method: [HEAD]}, deny: n}]\n"
    play = Play(policy).client(b"HEAD /a HTTP/1.1\r\n" + HOST + b"\r\n" + GET).server(OK)
    assert play.to_client.endswith(b"\r\n\r\n" + OK)


def test_a_denied_body_that_waits_for_100_is_not_asked_for() -> None:
    play = Play(NO_DELETE).client(
        b"DELETE /a HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"
    )
    assert play.to_client.startswith(b"HTTP/1.1 403 ")
    assert b"Connection: close" in play.to_client
    assert play.closed == "denied"


BAD_REQUESTS = {
    "both lengths": post(b"Content-Length: 3", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "differing lengths": post(b"Content-Length: 3", b"Content-Length: 4", body=b"abc"),
    "a list of lengths": post(b"Content-Length: 3, 3", body=b"abc"),
    "a signed length": post(b"Content-Length: +3", body=b"abc"),
    "two codings": post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "a coding twice": post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "an obscured coding": post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"),
    "identity": post(b"Transfer-Encoding: identity"),
    "a space before the colon": post(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"),
    "a folded header": post(b"X: 1", b" folded"),
    "a bare CR": post(b"X: 1\rTransfer-Encoding: chunked"),
    "a bare LF": b"GET /a HTTP/1.1\nHost: api.internal\n\n",
    "a bare LF in a header": post(b"X: 1\nY: 2"),
    "a NUL": post(b"X: \0"),
    "a chunked HTTP/1.0 request": b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no Host": b"GET /a HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /a HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "a Host with a path": b"GET /a HTTP/1.1\r\nHost: api.internal/x\r\n\r\n",
    "a Host with a user": b"GET /a HTTP/1.1\r\nHost: a@api.internal\r\n\r\n",
    "a target of another host": b"GET http://other/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "a fragment": b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n",
    "two spaces": b"GET  /a HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tab": b"GET\t/a HTTP/1.1\r\n" + HOST + b"\r\n",
    "no version": b"GET /a\r\n\r\n",
    "a version to come": b"GET /a HTTP/3.0\r\n" + HOST + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_what_peers_read_differently_is_refused_and_recorded(name: str) -> None:
    play = Play().client(BAD_REQUESTS[name])
    assert play.to_server == b""
    assert play.to_client.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert play.closed == "protocol_error"
    close = play.records[-1]
    assert close.kind == "close"
    assert close.detail
    assert close.detail.startswith("client: ")


@pytest.mark.parametrize(
    "chunks", [b"3 \r\nabc\r\n", b"0x3\r\nabc\r\n", b"3\nabc\r\n", b"3\r\nabcd\r\n", b"-1\r\n", b"3;\x00\r\nabc\r\n"]
)  # fmt: skip
def test_malformed_chunks_end_the_flow(chunks: bytes) -> None:
    play = Play().client(post(b"Transfer-Encoding: chunked"), chunks)
    assert play.closed == "protocol_error"
    assert play.to_client.startswith(b"HTTP/1.1 400 ")


def test_an_answer_under_way_is_not_cut_for_a_later_bad_request() -> None:
    play = Play().client(GET + BAD_REQUESTS["two Hosts"])
    assert play.closed is None
    play.server(OK)
    assert play.to_client.startswith(OK + b"HTTP/1.1 400 ")
    assert play.closed == "protocol_error"


def test_heads_at_the_limit_and_past_it() -> None:
    limits = SessionLimits(head_max_bytes=4096)
    filler = 4096 - len(post(b"X: "))
    assert Play(limits=limits).client(post(b"X: " + b"a" * filler)).to_server
    for parts in ((post(b"X: " + b"a" * (filler + 1)),), (b"GET /" + b"a" * 4000, b"a" * 200)):
        play = Play(limits=limits).client(*parts)
        assert play.to_client.startswith(b"HTTP/1.1 431 ")
        assert (play.to_server, play.closed) == (b"", "protocol_error")


def test_many_headers() -> None:
    assert Play().client(post(*[b"A: 1"] * 199)).to_server
    play = Play().client(post(*[b"A: 1"] * 200))
    assert play.to_client.startswith(b"HTTP/1.1 431 ")


def test_an_unasked_response_is_never_the_answer_to_a_later_request() -> None:
    play = Play().client(GET).server(OK + b"HTTP/1.1 408 Request Time-out\r\nContent-Length: 0\r\n\r\n")
    assert (play.to_client, play.closed) == (OK, "server_closed")


@pytest.mark.parametrize(
    "response",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 99 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"\x15\x03\x01",
        b"HTTP/1.1 200 OK\r\n folded: a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
    ],
)
def test_a_server_that_speaks_no_http(response: bytes) -> None:
    play = Play().client(GET).server(response)
    assert play.to_client.startswith(b"HTTP/1.1 503 ")
    assert play.closed == "protocol_error"
    assert play.of_kind("response")[0].response


# -- identity


@pytest.mark.parametrize(
    "name",
    [
        b"X-Workload-Identity",
        b"x-workload-identity",
        b"X_Workload_Identity",
        b"X-WORKLOAD_identity",
        b"X.Workload!Identity",
    ],
)
def test_a_clients_own_identity_header_is_removed(name: bytes) -> None:
    request = post(name + b": forged", b"A: 1", name + b":forged2", b"Content-Length: 0")
    play = Play(principal=ALICE, attachment=IDENTIFIED).client(request)
    assert b"forged" not in play.to_server
    assert play.to_server.count(TOKEN.encode()) == 1
    record = play.of_kind("request")[0]
    assert "forged" not in repr(record)
    assert TOKEN not in repr(play.records)


def test_it_is_removed_from_trailers_too() -> None:
    body = b"1\r\na\r\n0\r\nx_workload-Identity: forged\r\nB: 2\r\n\r\n"
    play = Play(principal=ALICE, attachment=IDENTIFIED).client(
        post(b"Transfer-Encoding: chunked", body=body) + GET
    )
    assert b"forged" not in play.to_server
    assert b"0\r\nB: 2\r\n\r\nGET" in play.to_server


def test_the_client_cannot_have_it_removed_further_on() -> None:
    request = post(b"Connection: keep-alive, X-Workload-Identity", b"Content-Length: 0")
    play = Play(principal=ALICE, attachment=IDENTIFIED).client(request)
    assert b"Connection: keep-alive\r\n" in play.to_server
    assert play.to_server.count(b"X-Workload-Identity") == 1


def test_a_target_that_nobody_declared_gets_no_token_but_loses_the_header() -> None:
    play = Play(principal=ALICE, attachment=Attachment(reserved_header="X-Workload-Identity"))
    play.client(post(b"X-Workload-Identity: forged", b"Content-Length: 0"))
    assert b"Identity" not in play.to_server


def test_required_identity() -> None:
    play = Play(required=True).client(GET + GET)
    assert not play.opened
    assert play.to_client.count(b"HTTP/1.1 403 ") == 1
    problem = json.loads(play.to_client.partition(b"\r\n\r\n")[2])
    assert problem["rule"] == "identity.required"
    assert "no_token" in problem["detail"]
    assert play.closed == "identity_required"


# -- bodies that rules look at

JSON_RULE = """\
version: 1
rules:
  - {name: no-purge, when: {path: "/a", request_json: {action: purge}}, deny: never}
"""


@pytest.mark.parametrize(
    ("headers", "body", "passes"),
    [
        ([b"Content-Type: application/json"], b'{"action": "purge"}', False),
        ([b"Content-Type: application/json"], b'{"action": "list"}', True),
        ([b"Content-Type: text/plain"], b'{"action": "purge"}', False),
        ([], b'{"action": "purge"}', False),
        ([], b'{"action": "\\u0070urge"}', False),
        ([], b'{"action": "purge", "action": "list"}', False),
        ([], b'{"action": "purge",}', False),
        ([], b'\xef\xbb\xbf{"action": "purge"}', False),
        ([], '{"action": "purge"}'.encode("utf-16"), False),
        ([b"Content-Encoding: gzip"], b"anything", False),
        ([b"Content-Type: application/json"], b"not json", False),
        ([b"Content-Type: application/x-www-form-urlencoded"], b"action=list", True),
        ([], b"", True),
    ],
)
def test_request_json_is_looked_at_whatever_it_is_called(
    headers: list[bytes], body: bytes, passes: bool
) -> None:
    request = post(*headers, b"Content-Length: %d" % len(body), body=body)
    play = Play(JSON_RULE).client(request)
    assert bool(play.to_server) == passes
    assert play.to_client.startswith(b"HTTP/1.1 403 ") != passes


def test_a_body_too_long_to_look_at_passes_only_where_no_rule_minds() -> None:
    limits = SessionLimits(held_max_bytes=100)
    body = b"40\r\n" + b"a" * 64 + b"\r\n"
    request = post(b"Transfer-Encoding: chunked") + body * 2
    play = Play(JSON_RULE, limits=limits).client(request)
    assert play.to_server == b""
    assert play.closed == "limit"
    other = request.replace(b"/a", b"/b")
    play = Play(JSON_RULE, limits=limits).client(
        other, body, b"0\r\nT: 1\r\n\r\n" + GET.replace(b"/a", b"/b")
    )
    assert play.to_server == other + body + b"0\r\nT: 1\r\n\r\n" + GET.replace(b"/a", b"/b")


def test_a_body_is_asked_for_only_when_its_turn_has_come() -> None:
    play = Play(JSON_RULE).client(GET + post(b"Expect: 100-continue", b"Content-Length: 2"))
    assert play.to_client == b""
    assert play.server(OK).to_client == OK + b"HTTP/1.1 100 Continue\r\n\r\n"
    assert play.client(b"{}").to_server.endswith(b"{}")


# -- the end that the driver wants


def test_an_abort_says_503_only_to_who_waits() -> None:
    idle = Play().client(GET).server(OK).do("abort", CloseReason.DRAINED, "stopping")
    assert (idle.to_client, idle.closed) == (OK, "drained")
    waiting = Play().client(GET).do("abort", CloseReason.DRAINED, "stopping")
    assert waiting.to_client.startswith(b"HTTP/1.1 503 ")
    assert b"Sidecar" in waiting.to_client


def test_credentials_stay_out_of_records() -> None:
    body = b'{"user": "a", "password": "hunter2", "nested": {"api_key": "zzk1\\"x", "n": 1}}'
    request = (
        b"POST /a?api_key=zzq1&page=2 HTTP/1.1\r\n" + HOST + b"Authorization: Bearer zzb1\r\nCookie: zzc1\r\nContent-Length: "
        + str(len(body)).encode() + b"\r\n\r\n" + body
    )  # fmt: skip
    answer = b'{"access_token":"zzt1","expires":3}'
    form = b"client_secret=zzs1&grant=x"
    play = (
        Play()
        .client(request)
        .server(b"HTTP/1.1 200 OK\r\nSet-Cookie: zzd1\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
    )
    play.client(post(b"Content-Length: %d" % len(form), body=form)).server(OK)
    assert play.to_server.startswith(request)
    written = repr(play.records)
    for secret in ("hunter2", "zzk1", "zzq1", "zzb1", "zzc1", "zzd1", "zzt1", "zzs1"):
        assert secret not in written, secret
    for kept in ('"user": "a"', '"n": 1', "page=2", '"expires":3', "grant=x"):
        assert kept in written, kept


# -- what servers read differently


CUSTOMERS = """\
version: 1
rules:
  - {name: kept, when: {protocol: http, method: DELETE, path: "/v1/customers/*"}, deny: kept}
  - {name: admin, when: {protocol: http, path: "/admin/**"}, deny: kept}
"""


@pytest.mark.parametrize(
    "line",
    [
        "DELETE /v1/customers/1",
        "DELETE /v1/customers/1/",
        "DELETE //v1//customers/./1",
        "DELETE /v1/customers/1%2f..%2f..%2f..%2fx",  # no slashes for a server that routes first
        "DELETE /v1/customers/1%252f..%252fx",
        "DELETE /v1/customers/1%5c..%5c..%5c..%5cx",
        "DELETE /v1/customers/1\\..\\..\\..\\x",
        "DELETE /v1/customers/1;%2f..%2f..%2f..%2fx",  # parameters that go before the path is decoded
        "DELETE /v1;a=b/customers;c/1;d",
        "DELETE /x/..;/v1/customers/1",
        "DELETE /%76%31/customers/1?a=b",
        "GET /admin/..;/x",
        "GET /admin/%2e%2e/x",
        "GET /admin/../x",
        "GET /admin%2fx",
        "GET /%2561dmin/x",
        "POST /v1/customers/1?_method=delete",
    ],
)
def test_a_path_that_some_server_takes_for_one_that_is_denied(line: str) -> None:
    play = Play(CUSTOMERS).client(f"{line} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
    assert play.to_server == b""
    assert b"403 Forbidden" in play.to_client


@pytest.mark.parametrize("name", ["X-HTTP-Method-Override", "x-http-method", "X-Method-Override"])
def test_a_method_that_a_header_names(name: str) -> None:
    play = Play(CUSTOMERS).client(
        b"POST /v1/customers/1 HTTP/1.1\r\n" + HOST + name.encode() + b": delete\r\n\r\n"
    )
    assert play.to_server == b""


@pytest.mark.parametrize(
    ("target", "passes"),
    [("/v1/a", True), ("/v1/a%20b/%C3%BC?x=%2f", True), ("//v1//a", True), ("/v1/a%2Fb", True), ("/v1/a;b", True),
     ("/v1/..%2Fadmin", False), ("/v1/..;/admin", False), ("/v1%2Fa", False), ("/x/../v1/a", False)],
)  # fmt: skip
def test_an_allow_wants_one_that_no_server_takes_for_another(target: str, passes: bool) -> None:
    policy = 'version: 1\ndefault: deny\nrules: [{name: api, when: {protocol: http, path: "/v1/**"}, allow: true}]\n'
    play = Play(policy).client(f"GET {target} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
    assert (play.to_server != b"") is passes
