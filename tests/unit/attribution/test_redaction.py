"""What a recorded command line may not hold, and what it keeps."""

from __future__ import annotations

import time

import pytest

from sidecar.attribution.redaction import CUT, MASK, MAX_ARGUMENT_CHARS, redact_cmdline

SECRET = "hunter2S3cr3t"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJqb2IifQ.c2lnbmF0dXJl"

HIDDEN = [
    (f"psql --password={SECRET}", "psql --password=****"),
    (f"psql postgresql://orders:{SECRET}@db/shop", "psql postgresql://orders:****@db/shop"),
    (f"psql postgresql://orders:p?{SECRET}#x@db/shop", "psql postgresql://orders:****@db/shop"),
    (
        f"psql|host=db user=u password={SECRET} sslmode=require",
        "psql|host=db user=u password=**** sslmode=require",
    ),
    (f"psql|host=db password = '{SECRET} with blanks'", "psql|host=db password = ****"),
    (f"psql|host=db password='it\\'s {SECRET}'", "psql|host=db password=****"),
    (f"psql postgresql://db/shop?user=u&password={SECRET}&sslmode=require", None),
    (f"mysql -p{SECRET} -h db", "mysql -p**** -h db"),
    (f"/usr/bin/mysqldump -uroot -p{SECRET} shop", "/usr/bin/mysqldump -uroot -p**** shop"),
    (f"env PGPASSWORD={SECRET} psql", "env PGPASSWORD=**** psql"),
    (f"env MYSQL_PWD={SECRET} mysql", "env MYSQL_PWD=**** mysql"),
    (f"env AWS_SECRET_ACCESS_KEY={SECRET} aws s3 ls", "env AWS_SECRET_ACCESS_KEY=**** aws s3 ls"),
    (f"bash|-c|PGPASSWORD='{SECRET} x' psql -c 'select 1'", "bash|-c|PGPASSWORD=**** psql -c 'select 1'"),
    (f"bash|-c|PGPASSWORD=''{SECRET} psql", "bash|-c|PGPASSWORD=**** psql"),
    (f"bash|-c|PGPASSWORD=\"a\"'{SECRET}' psql", "bash|-c|PGPASSWORD=**** psql"),
    (f'bash|-c|PGPASSWORD="{SECRET}', "bash|-c|PGPASSWORD=****"),
    (f"bash|-c|PGPASSWORD='{SECRET} never closed", "bash|-c|PGPASSWORD=****"),
    (f"bash|-c|mytool --api-key {SECRET} go", "bash|-c|mytool --api-key **** go"),
    (f"curl|-H|Authorization: Bearer {SECRET}|http://api", "curl|-H|Authorization: ****|http://api"),
    (f"curl|-HAuthorization: Basic {SECRET}", "curl|-HAuthorization: ****"),
    (f'curl|-H|Cookie: a="b"; s={SECRET}', "curl|-H|Cookie: ****"),
    (f"curl|-H|X-Api-Key: {SECRET}", "curl|-H|X-Api-Key: ****"),
    (f"curl|-H|PRIVATE-TOKEN: {SECRET}", "curl|-H|PRIVATE-TOKEN: ****"),
    (f"curl|--header=authorization: bearer {SECRET}", None),
    (
        f'sh|-c|curl -H "Authorization: Bearer {SECRET}" http://api',
        'sh|-c|curl -H "Authorization: ****" http://api',
    ),
    (f"curl -u admin:{SECRET} http://api", "curl -u admin:**** http://api"),
    (f"curl -uadmin:{SECRET} http://api", "curl -uadmin:**** http://api"),
    (f"curl --user admin:{SECRET} http://api", "curl --user admin:**** http://api"),
    (f"curl --oauth2-bearer {SECRET} http://api", "curl --oauth2-bearer **** http://api"),
    (f"curl -d client_secret={SECRET}&grant=x http://api", "curl -d client_secret=****&grant=x http://api"),
    (f'curl|-d|{{"password": "{SECRET}", "a": 1}}', 'curl|-d|{"password": ****, "a": 1}'),
    (
        f"git clone https://oauth2:{SECRET}@git.example/x.git",
        "git clone https://oauth2:****@git.example/x.git",
    ),
    ("git clone https://ghp_abcdefghijklmnopqrstuvwxyz0123456789@git.example/x", None),
    (f"tool --token {SECRET} run", "tool --token **** run"),
    (f"tool -token {SECRET} run", "tool -token **** run"),
    (f"tool --db.password={SECRET}", "tool --db.password=****"),
    (f"sshpass -p {SECRET} ssh host", "sshpass -p **** ssh host"),
    (f"sshpass -p{SECRET} ssh host", "sshpass -p**** ssh host"),
    (f"redis-cli -a {SECRET} ping", "redis-cli -a **** ping"),
    (f"env REDISCLI_AUTH={SECRET} redis-cli", "env REDISCLI_AUTH=**** redis-cli"),
    (f"docker login -u u -p {SECRET} registry", "docker login -u u -p **** registry"),
    (f"echo {JWT}", "echo ****"),
    (f"echo x={JWT}&y=1", "echo x=****&y=1"),
    (f"psql|-c|ALTER ROLE app PASSWORD '{SECRET}'", "psql|-c|ALTER ROLE app PASSWORD ****"),
    (f"mysql|-e|create user a identified by '{SECRET}'", "mysql|-e|create user a identified by ****"),
    ("tool|-----BEGIN RSA PRIVATE KEY-----\nhunter2S3cr3t\n-----END RSA PRIVATE KEY-----", "tool|****"),
]

KEPT = [
    "psql -h db -p 5432 -U orders shop",
    "psql --no-password -h db",
    "psql postgresql://orders@db:5432/shop",
    "git log --author someone",
    "docker login --password-stdin registry",
    "tool --token-file /run/secrets/token go",
    "tool --password-file=/run/secrets/p",
    "curl --cookie-jar /tmp/jar http://api/v1/customers?limit=10",
    "python3 -m http.server 8080",
    "curl http://api:8080/@scope/package",
    "bash -c exit",
    "ssh -o PreferredAuthentications=publickey host",
]


def split(text: str) -> tuple[str, ...]:
    return tuple(text.split("|") if "|" in text else text.split(" "))


@pytest.mark.parametrize(("given", "expected"), HIDDEN, ids=range(len(HIDDEN)))
def test_secrets_are_hidden(given: str, expected: str | None) -> None:
    found = redact_cmdline(split(given))
    text = "|".join(found)
    assert SECRET not in text
    assert "ghp_" not in text
    assert JWT not in text
    assert MASK in text
    if expected is not None:
        assert found == split(expected)


@pytest.mark.parametrize("given", KEPT)
def test_the_rest_is_kept(given: str) -> None:
    assert redact_cmdline(split(given)) == split(given)


def test_an_option_that_prompts_does_not_hide_the_next_option() -> None:
    assert redact_cmdline(("tool", "--password", "--host", "db")) == ("tool", "--password", "--host", "db")


def test_nothing_to_redact() -> None:
    assert redact_cmdline(()) == ()


def test_a_long_argument_is_cut_and_says_so() -> None:
    (_, found) = redact_cmdline(("sh", "x" * 10_000))
    assert len(found) == MAX_ARGUMENT_CHARS + len(CUT)
    assert found.endswith(CUT)


@pytest.mark.parametrize(
    "hostile",
    [
        "password" * 600,
        "a-" * 3000 + "key",
        "x-" * 3000 + "token:",
        "a" * 6000 + "://",
        "--" + "pass-" * 1200,
        "key" + "=" * 6000,
        "key" + " " * 6000,
        "key" + "-" * 6000,
        "key" + "'" * 6000,
        "a://" * 1500,
        "token " * 1000,
        "eyJ" * 2000 + ".",
        "password=" + "a'b'" * 1500 + "'",
        "password='" + "\\" * 4000,
        "password=" + "'" * 4001,
        'token="' * 800,
    ],
)
def test_a_hostile_argument_costs_little(hostile: str) -> None:
    started = time.process_time()
    redact_cmdline(("tool", hostile))
    assert time.process_time() - started < 0.1
