"""What a request's record must not hold: values bound to masked columns, and secrets, wherever they stand in the text."""

from __future__ import annotations

import pytest

from sidecar.model.flow import Address
from sidecar.policy import load_policy
from sidecar.session.postgres import PostgresSession
from sidecar.session.postgres_judge import Judge
from tests.support.session_relay import SessionRelay

MASKS = "version: 1\nrules: [{name: pii, when: {protocol: postgres}, mask: {columns: {public.customers.ssn: redact}}}]\n"
NONE = "version: 1\n"
VALUE = "zq7wk"


def judge(policy: str) -> Judge:
    relay = SessionRelay(PostgresSession, load_policy(policy, "policy.yaml"), Address("127.0.0.1", 1))
    relay._loop.close()
    return Judge(relay.context())


BOUND = (
    "INSERT INTO customers (id, ssn) VALUES (1, 'zq7wk')",
    "INSERT INTO customers VALUES (1, 'zq7wk')",
    "INSERT INTO customers (id, ssn) SELECT 1, 'zq7wk'",
    "INSERT INTO customers (ssn) SELECT 'zq7wk' UNION ALL SELECT 'zq7wk2'",
    "INSERT INTO customers (ssn) SELECT x FROM (VALUES ('zq7wk')) v(x)",
    "WITH v(x) AS (VALUES ('zq7wk')) INSERT INTO customers (ssn) SELECT x FROM v",
    "WITH v(x) AS (SELECT 'zq7wk'::text) UPDATE customers SET ssn = v.x FROM v",
    "UPDATE customers SET ssn = 'zq7wk' WHERE id = 1",
    "UPDATE customers SET (id, ssn) = (1, 'zq7wk')",
    "UPDATE customers SET (id, ssn) = (SELECT 1, 'zq7wk')",
    "UPDATE customers c SET ssn = v.s FROM (VALUES (1, 'zq7wk')) v(i, s) WHERE c.id = v.i",
    "INSERT INTO customers (id, ssn) VALUES (1, '') ON CONFLICT (id) DO UPDATE SET ssn = 'zq7wk'",
    "SELECT * FROM customers WHERE ssn = 'zq7wk' OR id = 5",
    "SELECT * FROM customers WHERE ssn IN ('zq7wk', $1)",
    "SELECT * FROM customers WHERE (id, ssn) = (1, 'zq7wk')",
    "SELECT * FROM customers WHERE ssn LIKE 'zq7wk%' ESCAPE '!'",
    "SELECT * FROM customers c JOIN (VALUES ('zq7wk')) v(x) ON v.x = c.ssn",
    "SELECT * FROM customers WHERE ssn = (SELECT 'zq7wk')",
    "SELECT * FROM customers WHERE EXISTS (SELECT 1 FROM (SELECT 'zq7wk' AS z) q WHERE z = ssn)",
    "SELECT * FROM customers WHERE ssn IN (VALUES ('zq7wk'))",
    "DELETE FROM customers USING (VALUES ('zq7wk')) v(x) WHERE ssn = x",
    "MERGE INTO customers c USING (VALUES ('zq7wk')) v(x) ON c.ssn = v.x WHEN NOT MATCHED THEN INSERT (id, ssn) VALUES (1, 'zq7wk')",
    "SELECT CASE ssn WHEN 'zq7wk' THEN 1 END FROM customers",
    "EXECUTE p(1, 'zq7wk')",
    "EXPLAIN ANALYZE EXECUTE p('zq7wk')",
    "CREATE TABLE customers (id int, ssn text DEFAULT 'zq7wk')",
    "ALTER TABLE customers ALTER COLUMN ssn SET DEFAULT 'zq7wk'",
    "ALTER TABLE customers ADD CHECK (ssn <> 'zq7wk')",
    "DO $$ BEGIN UPDATE customers SET ssn = 'zq7wk'; END $$",
    "CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'UPDATE customers SET ssn = ''zq7wk'''",
)
SECRET = (
    "ALTER ROLE x PASSWORD 'zq7wk'",
    "CREATE ROLE x LOGIN ENCRYPTED PASSWORD 'zq7wk' VALID UNTIL '2030-01-01'",
    "CREATE USER x WITH PASSWORD E'zq7wk\\'x'",
    "SELECT 1; ALTER ROLE x PASSWORD $x$zq7wk$x$; SELECT 'fine'",
    "ALTER ROLE x PASSWORD /* 'no' */ U&'zq7wk'",
    "ALTER ROLE x PASSWORD 'zq7wk",
    "CREATE USER MAPPING FOR x SERVER s OPTIONS (user 'bob', password 'zq7wk')",
    "ALTER USER MAPPING FOR x SERVER s OPTIONS (SET password 'zq7wk')",
    "CREATE SERVER s FOREIGN DATA WRAPPER f OPTIONS (host 'h', passwd 'zq7wk')",
    "CREATE SUBSCRIPTION s CONNECTION 'host=h password=zq7wk' PUBLICATION p",
    "ALTER SUBSCRIPTION s CONNECTION 'host=h user=zq7wk'",
    "SELECT * FROM dblink('host=h password=zq7wk', 'SELECT 1') AS t(a int)",
    "SELECT dblink_connect('postgresql://u:zq7wk@h/db')",
    "SELECT dblink_connect('c', 'host=h user=u passwo' || 'rd=zq7wk')",
    "ALTER SYSTEM SET primary_conninfo = 'host=h password=zq7wk'",
    "SET SESSION my.api_token = 'zq7wk'",
    "SELECT set_config('app.api_secret', 'zq7wk', false)",
    "SELECT crypt('zq7wk', gen_salt('bf'))",
    "SELECT pgp_sym_encrypt('data', 'zq7wk')",
    "UPDATE users SET password_hash = crypt('zq7wk', gen_salt('bf')) WHERE id = 1",
    "INSERT INTO users (name, password) VALUES ('bob', 'zq7wk')",
    "SELECT * FROM sessions WHERE access_token = 'zq7wk'",
    "COPY t FROM PROGRAM 'curl -u bob:zq7wk https://x'",
    "COPY t TO PROGRAM 'curl -H \"Authorization: Bearer zq7wk\" https://x'",
    "SELECT 1 -- password zq7wk",
    "SELECT 1 /* secret: zq7wk */",
)
PARAMETERS = (
    ("INSERT INTO customers (id, ssn) SELECT $1, $2", (1,)),
    ("UPDATE customers SET ssn = v.s FROM (VALUES ($1, $2)) v(i, s)", (0, 1)),
    ("SELECT 1 FROM customers WHERE id = $1 AND ssn = $2", (1,)),
    ("PREPARE p AS INSERT INTO customers (ssn, id) VALUES ($1, $2)", (0,)),
    ("SELECT crypt($1, 'x'), $2", (0,)),
    ("UPDATE users SET api_token = $1 WHERE id = $2", (0,)),
)
KEPT = (
    "INSERT INTO customers (id, name) SELECT 1, 'visible'",
    "SELECT * FROM customers WHERE id = 5 AND name = 'visible'",
    "INSERT INTO orders (id, note) VALUES (1, 'visible')",
    "SELECT 'visible' FROM customers",
    "UPDATE orders SET note = 'visible'",
    "COPY t FROM PROGRAM 'zcat visible.gz'",
)


@pytest.mark.parametrize("text", BOUND)
def test_values_of_masked_columns_are_replaced(text: str) -> None:
    shown = judge(MASKS).decide(text.encode()).operation.text
    assert isinstance(shown, str)
    assert VALUE not in shown
    assert "masked at" in shown


@pytest.mark.parametrize("policy", [MASKS, NONE], ids=["masks", "none"])
@pytest.mark.parametrize("text", SECRET)
def test_secrets_are_replaced_whatever_the_policy_says(text: str, policy: str) -> None:
    decision = judge(policy).decide(text.encode())
    assert VALUE not in str(decision.operation.text)
    assert VALUE not in str(decision.part.reason)


@pytest.mark.parametrize(("text", "hidden"), PARAMETERS)
def test_parameters_are_replaced_by_their_number(text: str, hidden: tuple[int, ...]) -> None:
    asked = judge(MASKS)
    decision = asked.decide(text.encode())
    shown = asked.shown(decision, ("a", b"b"))
    assert shown == tuple(f"[masked parameter ${n + 1}]" if n in hidden else value for n, value in enumerate(("a", b"b")))  # fmt: skip


@pytest.mark.parametrize("text", KEPT)
def test_what_is_neither_stays_as_it_is(text: str) -> None:
    assert judge(MASKS).decide(text.encode()).operation.text == text


def test_texts_that_share_a_shape_share_no_secret() -> None:
    asked = judge(MASKS)
    for value in ("zq7wk", "zq7wk2", "zq7wk3"):
        for text in ("SELECT 1 FROM t WHERE api_token = '{}'", "SELECT crypt('{}', 'x')", "EXECUTE p('{}')"):
            assert VALUE not in str(asked.decide(text.format(value).encode()).operation.text)
