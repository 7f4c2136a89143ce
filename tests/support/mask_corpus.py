"""Statements around masked columns, and what of each result column a client may see.

One letter a result column: `m` masked (NULL, or a mask's text), `c` clean (exactly what the server says without us). tests/servers/test_postgres_mask_corpus.py runs them.
"""

from __future__ import annotations

from typing import Final

POLICY: Final = """\
version: 1
rules:
  - name: pii
    when: {protocol: postgres}
    mask:
      columns: {public.customers.ssn: redact, public.customers.card: {keep_last: 4}, public.staff.salary: null}
"""

SCHEMA: Final = """
DROP SCHEMA IF EXISTS public CASCADE; CREATE SCHEMA public; DROP SCHEMA IF EXISTS other CASCADE; CREATE SCHEMA other;
CREATE TABLE customers (id int PRIMARY KEY, name text, ssn text, card varchar(20), born date, note text);
INSERT INTO customers SELECT i, 'name ' || i, 'zq7wk-000' || i, '411111111111111' || i, '2000-01-01', CASE WHEN i = 2 THEN 'n' END
  FROM generate_series(1, 3) i;
CREATE TABLE staff (id int, boss int, salary numeric);
INSERT INTO staff VALUES (1, NULL, 918273), (2, 1, 918274);
CREATE TABLE orders (id int, customer_id int, total int, ssn text);
INSERT INTO orders VALUES (1, 1, 10, 'open-1'), (2, 2, 20, 'open-2');
CREATE TABLE other.customers (id int, ssn text, label text);
INSERT INTO other.customers VALUES (1, 'free-1', 'l');
CREATE TABLE sink (a text, b text);
CREATE TABLE numbers (n int); INSERT INTO numbers VALUES (1), (2);
CREATE VIEW people AS SELECT id, name, ssn AS secret, upper(ssn) AS shouted, length(name) AS size FROM customers;
CREATE VIEW of_view AS SELECT secret AS s2, id AS i2 FROM people;
CREATE VIEW harmless AS SELECT id, name FROM customers WHERE ssn IS NOT NULL;
CREATE MATERIALIZED VIEW kept AS SELECT id, ssn AS x FROM customers;
CREATE VIEW with_row AS SELECT c AS whole, c.id FROM customers c;
CREATE VIEW united AS SELECT name AS v FROM customers UNION ALL SELECT ssn FROM customers;
CREATE TABLE archive () INHERITS (customers);
CREATE TABLE measured (id int, ssn text) PARTITION BY RANGE (id);
CREATE TYPE pair AS (a text, b int);
CREATE FUNCTION peek() RETURNS text LANGUAGE sql AS 'SELECT ssn FROM public.customers ORDER BY id LIMIT 1';
CREATE FUNCTION rows_of() RETURNS TABLE (a int, b text) LANGUAGE sql AS 'SELECT id, ssn FROM public.customers';
CREATE FUNCTION other.initcap(int) RETURNS text LANGUAGE sql AS 'SELECT ssn FROM public.customers ORDER BY id LIMIT 1';
CREATE FUNCTION glue(int, int) RETURNS text LANGUAGE sql AS 'SELECT ssn FROM public.customers ORDER BY id LIMIT 1';
CREATE OPERATOR %% (LEFTARG = int, RIGHTARG = int, FUNCTION = glue);
CREATE FUNCTION spied(int) RETURNS text LANGUAGE sql AS 'SELECT ssn FROM public.customers ORDER BY id LIMIT 1';
CREATE VIEW calling AS SELECT id, peek() AS p FROM orders;
CREATE FUNCTION secret_error(text) RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no: %'', $1; END';
CREATE FUNCTION secret_notice() RETURNS int LANGUAGE plpgsql AS 'BEGIN RAISE NOTICE ''%'', (SELECT ssn FROM public.customers LIMIT 1); RETURN 1; END';
ANALYZE customers;
"""

RESULTS: Final[tuple[tuple[str, str], ...]] = (
    # plain columns and their aliases
    ("SELECT ssn FROM customers", "m"),
    ("SELECT ssn AS id, id AS ssn FROM customers", "mc"),
    ("SELECT * FROM customers", "ccmmcc"),
    ("TABLE customers", "ccmmcc"),
    ("SELECT c.* FROM customers c", "ccmmcc"),
    ('SELECT "ssn" FROM "public"."customers"', "m"),
    ('SELECT U&"\\0073sn" FROM customers', "m"),
    ("SELECT public.customers.ssn FROM public.customers", "m"),
    ("SELECT x FROM customers AS t(i, n, x)", "m"),
    ("SELECT n FROM customers AS t(i, n, x)", "c"),
    ("SELECT card, salary FROM customers, staff", "mm"),
    ("SELECT ssn FROM ONLY customers", "m"),
    ("SELECT ssn FROM archive", ""),
    ("SELECT ssn FROM customers TABLESAMPLE SYSTEM (100)", "m"),
    ("SELECT DISTINCT ssn FROM customers", "m"),
    ("SELECT DISTINCT ON (ssn) id FROM customers", "c"),
    ("SELECT ssn FROM customers FOR UPDATE", "m"),
    # what is beside them stays clean
    ("SELECT count(*), upper(ssn) FROM customers GROUP BY ssn", "cm"),
    ("SELECT upper(ssn), upper(name), id + 1 FROM customers", "mcc"),
    ("SELECT 'x' AS ssn, count(*) AS card FROM customers", "cc"),
    ("SELECT count(ssn), count(DISTINCT ssn) FROM customers", "cc"),
    ("SELECT ssn IS NULL, ssn IS NOT NULL, id FROM customers", "ccc"),
    ("SELECT id, upper(name) FROM customers WHERE ssn LIKE '%1' ORDER BY ssn", "cc"),
    ("SELECT max(id), min(born), string_agg(name, ',' ORDER BY ssn) FROM customers", "ccc"),
    ("SELECT now() IS NULL, current_user, 1 + 1, version() FROM customers", "cccc"),
    ("SELECT exists(SELECT 1 FROM customers WHERE ssn = 'a'), 5", "cc"),
    ("SELECT (SELECT count(*) FROM customers), (SELECT max(ssn) FROM customers)", "cm"),
    ("SELECT row_number() OVER (ORDER BY ssn), id FROM customers", "cc"),
    ("SELECT count(*) FROM customers GROUP BY ssn HAVING max(ssn) > ''", "c"),
    ("SELECT upper(ssn) FROM orders", "c"),
    ("SELECT upper(o.ssn), upper(c.ssn) FROM orders o JOIN customers c ON c.id = o.customer_id", "cm"),
    ("SELECT upper(ssn) FROM other.customers", "c"),
    ("SELECT o.*, lower(c.name) FROM orders o, customers c", "ccccc"),
    ("SELECT c.*, o.*, o.total * 2 FROM customers c, orders o", "ccmmcc" + "cccc" + "c"),
    ("SELECT to_json(o) FROM orders o JOIN customers c ON true", "c"),
    ("SELECT name || id::text, coalesce(note, 'none'), born + 1 FROM customers", "ccc"),
    ("SELECT json_build_object('n', name, 'i', id) FROM customers", "c"),
    ("SELECT array_agg(id), array_agg(ssn) FROM customers", "cm"),
    ("SELECT CASE WHEN id > 1 THEN name ELSE 'one' END FROM customers", "c"),
    ("SELECT grouping(name), count(*) FROM customers GROUP BY ROLLUP (name)", "cc"),
    ("SELECT g, name FROM customers, generate_series(1, 2) g", "cc"),
    ("SELECT total FROM orders NATURAL JOIN numbers", "c"),
    # expressions
    ("SELECT ssn || '' FROM customers", "m"),
    ("SELECT concat(id, ':', ssn) FROM customers", "m"),
    ("SELECT format('%s', ssn) FROM customers", "m"),
    ("SELECT reverse(ssn), md5(ssn), length(ssn) FROM customers", "mmm"),
    ("SELECT encode(ssn::bytea, 'hex'), encode(convert_to(ssn, 'UTF8'), 'base64') FROM customers", "mm"),
    ("SELECT substr(ssn, 1, 3), left(card, 6), ascii(ssn) FROM customers", "mmm"),
    ("SELECT CAST(ssn AS varchar), ssn::char(20), ssn::name FROM customers", "mmm"),
    ("SELECT ssn COLLATE \"C\" || '' FROM customers", "m"),
    ("SELECT CASE WHEN ssn LIKE 'z%' THEN 'z' ELSE 'other' END FROM customers", "m"),
    ("SELECT CASE ssn WHEN 'zq7wk-0001' THEN 1 END FROM customers", "m"),
    ("SELECT coalesce(NULL, ssn), nullif(ssn, ''), greatest(ssn, ''), least('zzz', ssn) FROM customers", "mmmm"),
    ("SELECT ssn = 'zq7wk-0001', ssn > 'a', ssn ~ 'zq' FROM customers", "mmm"),
    ("SELECT ssn IN ('a'), ssn BETWEEN 'a' AND 'z', ssn = ANY (ARRAY['a']) FROM customers", "mmm"),
    ("SELECT ARRAY[ssn], ARRAY[name], (ARRAY[ssn])[1] FROM customers", "mcm"),
    ("SELECT ROW(id, ssn), ROW(id, name) FROM customers", "mc"),
    ("SELECT (ROW(ssn, 1)::pair).a, (ROW(name, 1)::pair).a FROM customers", "mc"),
    ("SELECT regexp_replace(ssn, 'q', 'p'), translate(ssn, 'zq', 'ab') FROM customers", "mm"),
    ("SELECT salary + 1, -salary, round(salary), salary::text FROM staff", "mmmm"),
    ("SELECT salary, boss FROM staff", "mc"),
    ("SELECT sum(salary), avg(salary), stddev(salary), count(salary) FROM staff", "mmmc"),
    ("SELECT string_to_array(ssn, '-'), regexp_matches(ssn, '(.)') FROM customers", "mm"),
    ("SELECT to_tsvector(ssn) FROM customers", "m"),
    ("SELECT overlay(ssn placing 'x' from 1), trim(ssn), position('q' in ssn) FROM customers", "mmm"),
    # whole rows
    ("SELECT c FROM customers c", "m"),
    ("SELECT o, h FROM orders o, harmless h", "cc"),
    ("SELECT p FROM people p", "m"),
    ("SELECT customers FROM customers", "m"),
    ("SELECT c::text FROM customers c", "m"),
    ("SELECT (c).ssn, (c).name FROM customers c", "mc"),
    ("SELECT (c).* FROM customers c", "ccmmcc"),
    ("SELECT row_to_json(c), to_jsonb(c) FROM customers c", "mm"),
    ("SELECT row_to_json(c) FROM (SELECT id, name FROM customers) c", "c"),
    ("SELECT row_to_json(c) FROM (SELECT id, ssn AS x FROM customers) c", "m"),
    ("SELECT c.to_json FROM customers c", "m"),
    ("SELECT ssn(c) || '' FROM customers c", "m"),
    ("SELECT count(c), count(c.*) FROM customers c", "cc"),
    ("SELECT json_agg(c) FROM customers c", "m"),
    ("SELECT array_agg(c) FROM customers c", "m"),
    ("SELECT ROW(c.*) FROM customers c", "m"),
    ("SELECT hashtext(c::text) FROM customers c", "m"),
    ("SELECT jsonb_path_query(to_jsonb(c), '$.ssn') FROM customers c", "m"),
    ("SELECT xmlelement(name a, ssn), xmlforest(name) FROM customers", "mc"),
    ("SELECT query_to_xml('SELECT ssn FROM customers', true, true, '')", "m"),
    # aggregates and windows
    ("SELECT max(ssn), min(card), string_agg(ssn, ','), string_agg(name, ',') FROM customers", "mmmc"),
    ("SELECT json_agg(ssn), jsonb_object_agg(id, ssn), json_object_agg(id, name) FROM customers", "mmc"),
    ("SELECT percentile_disc(0.5) WITHIN GROUP (ORDER BY ssn) FROM customers", "m"),
    ("SELECT mode() WITHIN GROUP (ORDER BY ssn), mode() WITHIN GROUP (ORDER BY name) FROM customers", "mc"),
    ("SELECT first_value(ssn) OVER (ORDER BY id), lag(name) OVER w FROM customers WINDOW w AS (ORDER BY id)", "mc"),
    ("SELECT count(*) FILTER (WHERE ssn LIKE 'z%') OVER (PARTITION BY id), count(*) OVER () FROM customers", "mc"),
    ("SELECT array_agg(id ORDER BY ssn), array_agg(DISTINCT ssn) FROM customers", "cm"),
    ("SELECT bool_or(ssn LIKE 'z%'), every(id > 0) FROM customers", "mc"),
    # queries inside queries
    ("SELECT x FROM (SELECT ssn AS x FROM customers) q", "m"),
    ("SELECT upper(x), upper(y) FROM (SELECT ssn AS x, name AS y FROM customers) q", "mc"),
    ("SELECT upper(b), a FROM (SELECT id, ssn FROM customers) q(a, b)", "mc"),
    ("SELECT upper(ssn), upper(name) FROM (SELECT * FROM customers) q", "mc"),
    ("SELECT * FROM (SELECT upper(ssn), upper(name) FROM customers) q", "mc"),
    ("SELECT * FROM (SELECT id, ssn || '' AS x FROM customers) a, (SELECT count(*) FROM orders) b", "cmc"),
    ("SELECT (SELECT ssn FROM customers WHERE id = 1), (SELECT name FROM customers WHERE id = 1)", "mc"),
    ("SELECT ARRAY(SELECT ssn FROM customers), ARRAY(SELECT id FROM customers)", "mc"),
    ("SELECT 'a' IN (SELECT ssn FROM customers), 1 IN (SELECT id FROM customers)", "mc"),
    ("SELECT o.id, (SELECT c.ssn FROM customers c WHERE c.id = o.customer_id) FROM orders o", "cm"),
    ("SELECT (SELECT c.ssn || o.total) FROM customers c, orders o", "m"),
    ("SELECT (SELECT ssn) FROM customers", "m"),
    ("SELECT (SELECT total FROM orders ORDER BY c.ssn LIMIT 1) FROM customers c", "c"),
    ("SELECT u FROM customers, LATERAL (SELECT ssn AS u) l", "m"),
    ("SELECT upper(u), upper(v) FROM customers c, LATERAL (SELECT c.ssn AS u, c.name AS v) l", "mc"),
    ("SELECT u, name FROM customers, unnest(ARRAY[ssn]) u", "mc"),
    ("SELECT u FROM customers, unnest(string_to_array(ssn, '-')) AS u", "m"),
    ("SELECT x.key, x.value FROM customers c, json_each_text(row_to_json(c)) x", "mm"),
    ("SELECT j FROM customers c CROSS JOIN LATERAL jsonb_each_text(to_jsonb(c)) j", "m"),
    ("SELECT t FROM customers, regexp_split_to_table(ssn, '') t", "m"),
    ("SELECT z.u FROM (SELECT 'a' AS ssn) s, (SELECT upper(ssn) u FROM customers) z", "m"),
    ("SELECT (SELECT z.u FROM (SELECT 'a' AS ssn) s, (SELECT upper(ssn) u) z) FROM customers", "m"),
    ("SELECT v.column1, upper(v.column2) FROM (VALUES (1, (SELECT ssn FROM customers LIMIT 1)), (2, 'x')) v", "cm"),
    ("VALUES (1, (SELECT max(ssn) FROM customers)), (2, 'x')", "cm"),
    ("SELECT a.x FROM (SELECT b.x FROM (SELECT c.x FROM (SELECT ssn AS x FROM customers) c) b) a", "m"),
    ("SELECT q FROM (SELECT ssn FROM customers) q", "m"),
    ("SELECT (q).x, (q).i FROM (SELECT id AS i, ssn AS x FROM customers) q", "mc"),
    # CTEs
    ("WITH q AS (SELECT ssn FROM customers) SELECT lower(ssn) FROM q", "m"),
    ("WITH q(x, y) AS (SELECT ssn, name FROM customers) SELECT x || '', y || '' FROM q", "mc"),
    ("WITH customers AS (SELECT 1 AS id, 'own' AS ssn) SELECT upper(ssn) FROM customers", "c"),
    ("WITH customers AS (SELECT * FROM public.customers) SELECT upper(ssn), upper(name) FROM customers", "mc"),
    ("WITH a AS (WITH b AS (SELECT ssn AS v FROM customers) SELECT v FROM b) SELECT upper(v) FROM a", "m"),
    ("WITH a AS MATERIALIZED (SELECT ssn s, id i FROM customers), b AS (SELECT s t, i FROM a) SELECT t || '', i + 1 FROM b", "mc"),
    ("WITH RECURSIVE r(n, v) AS (SELECT 1, 'x' UNION ALL SELECT n + 1, (SELECT ssn FROM customers LIMIT 1) FROM r WHERE n < 3)"
     " SELECT n, v FROM r", "cm"),
    ("WITH RECURSIVE r(a, b, c, n) AS (SELECT 'x', 'y', ssn, 1 FROM customers UNION ALL SELECT b, c, a, n + 1 FROM r WHERE n < 4)"
     " SELECT a, n FROM r", "mc"),
    ("WITH RECURSIVE r(i) AS (SELECT 1 UNION SELECT boss FROM staff, r WHERE staff.id = r.i) SELECT i + 0 FROM r", "c"),
    ("WITH u AS (UPDATE customers SET note = 'x' RETURNING ssn AS v, id) SELECT v || '', id + 1 FROM u", "mc"),
    ("WITH d AS (DELETE FROM customers RETURNING *) SELECT upper(ssn), upper(name) FROM d", "mc"),
    ("WITH i AS (INSERT INTO customers (id, ssn) VALUES (9, 'zq7wk-0009') RETURNING ssn || '' AS x, id) SELECT x, id FROM i", "mc"),
    # set operations
    ("SELECT ssn FROM customers UNION SELECT 'x'", "m"),
    ("SELECT 'x' UNION ALL SELECT ssn FROM customers", "m"),
    ("SELECT id, name FROM customers UNION ALL SELECT id, ssn FROM customers", "cm"),
    ("SELECT ssn FROM customers EXCEPT SELECT name FROM customers", "m"),
    ("SELECT id, name FROM customers EXCEPT SELECT id, ssn FROM customers", "cc"),
    ("SELECT name FROM customers INTERSECT SELECT name FROM customers", "c"),
    ("SELECT * FROM public.customers UNION SELECT * FROM public.customers", "ccmmcc"),
    ("(SELECT 1, ssn FROM customers LIMIT 1) UNION (SELECT 2, name FROM customers ORDER BY 2 LIMIT 1)", "cm"),
    ("SELECT x FROM (SELECT name AS x FROM customers UNION SELECT ssn FROM customers) q", "m"),
    # joins
    ("SELECT ssn FROM customers JOIN (SELECT 'zq7wk-0001' AS ssn) x USING (ssn)", "m"),
    ("SELECT ssn FROM customers FULL JOIN (SELECT 'y' AS ssn) x USING (ssn)", "m"),
    ("SELECT * FROM (SELECT id, ssn FROM customers) a FULL JOIN (SELECT id, total FROM orders) b USING (id)", "cmc"),
    ("SELECT ssn FROM customers NATURAL FULL JOIN (SELECT 'y' AS ssn) x", "m"),
    ("SELECT j.x, j.i FROM (customers JOIN numbers ON true) AS j(i, n, x)", "mc"),
    ("SELECT upper(j.ssn), upper(j.name) FROM (customers JOIN numbers ON true) AS j", "mc"),
    ("SELECT upper(a.ssn), upper(a.name) FROM customers a LEFT JOIN customers b ON a.ssn = b.ssn", "mc"),
    ("SELECT count(*), max(o.total) FROM customers c JOIN orders o ON o.customer_id = c.id AND c.ssn <> ''", "cc"),
    # views, inheritance
    ("SELECT secret FROM people", "m"),
    ("SELECT * FROM people", "ccmmm"),
    ("SELECT id, name FROM people", "cc"),
    ("SELECT upper(secret), upper(name) FROM people", "mc"),
    ("SELECT s2, i2 FROM of_view", "mc"),
    ("SELECT s2 || '', i2 + 1 FROM of_view", "mc"),
    ("SELECT upper(name), id FROM harmless", "cc"),
    ("SELECT x, id, upper(x) FROM kept", "mcm"),
    ("SELECT whole, id FROM with_row", "mc"),
    ("SELECT (whole).name, whole::text FROM with_row", "mm"),
    ("SELECT v FROM united", "m"),
    ("SELECT row_to_json(p) FROM people p", "m"),
    ("SELECT row_to_json(h) FROM harmless h", "c"),
    ("SELECT upper(x) FROM (SELECT secret AS x FROM people) q", "m"),
    ("SELECT p, id FROM calling", "mc"),
    # functions and operators whose body is not in the text
    ("SELECT peek()", "m"),
    ("SELECT public.peek(), 1", "mc"),
    # a function may be written as a field
    ("SELECT (1).spied, (SELECT 1) AS b", "mc"),
    ("SELECT (n).spied FROM numbers", "m"),
    ("SELECT ((SELECT 1)).spied", "m"),
    ("SELECT ('select to_tsvector(ssn) from customers'::text).ts_stat", "m"),
    ("SELECT (('a', 1)::pair).a, (('a', 1)::pair).b + 1", "cc"),
    ("SELECT a, b FROM rows_of()", "mm"),
    ("SELECT id, upper(name), peek() FROM customers", "ccm"),
    ("SELECT other.initcap(1), pg_catalog.initcap('a')", "mc"),
    ("SELECT 1 %% 2", "m"),
    ("SELECT (SELECT peek()), count(*) FROM orders", "mc"),
    ("SELECT x FROM (SELECT peek() AS x) q", "m"),
    # statistics
    ("SELECT most_common_vals FROM pg_stats WHERE tablename = 'customers'", "m"),
    ("SELECT histogram_bounds AS harmless FROM pg_stats WHERE tablename = 'customers'", "m"),
    ("SELECT histogram_bounds::text, tablename || '' FROM pg_stats WHERE tablename = 'customers'", "mc"),
    ("SELECT stavalues1::text FROM pg_statistic WHERE starelid = 'customers'::regclass", "m"),
    ("SELECT s::text FROM pg_stats s WHERE tablename = 'customers'", "m"),
    ("SELECT relname || '', relkind FROM pg_class WHERE relname = 'customers'", "cc"),
    ("SELECT column_name || '' FROM information_schema.columns WHERE table_name = 'customers'", "c"),
    # RETURNING, EXPLAIN
    ("UPDATE customers SET note = 'x' RETURNING ssn, upper(ssn), upper(name)", "mmc"),
    ("UPDATE customers SET ssn = upper(ssn) RETURNING id, ssn", "cm"),
    ("DELETE FROM customers RETURNING *", "ccmmcc"),
    ("DELETE FROM orders USING customers c WHERE c.id = customer_id RETURNING c.ssn || '', total + 1", "mc"),
    ("INSERT INTO customers (id, ssn) VALUES (9, 'zq7wk-0009') RETURNING id, ssn, ssn || ''", "cmm"),
    ("INSERT INTO customers (id, ssn) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET ssn = excluded.ssn RETURNING customers::text", "m"),
    ("EXPLAIN (COSTS OFF) SELECT upper(ssn) FROM customers", "c"),
    ("SHOW server_version", "c"),
)  # fmt: skip

REFUSED: Final = (
    "COPY customers TO STDOUT",
    "COPY customers (id, ssn) TO STDOUT",
    "COPY (SELECT * FROM customers) TO STDOUT",
    "COPY (SELECT upper(ssn) FROM customers) TO STDOUT WITH (FORMAT binary)",
    "COPY (SELECT * FROM people) TO STDOUT",
    "COPY (SELECT s2 FROM of_view) TO STDOUT",
    "COPY (SELECT peek()) TO STDOUT",
    "COPY (WITH q(x) AS (SELECT ssn FROM customers) SELECT x FROM q) TO STDOUT",
    "COPY customers TO PROGRAM 'cat'",
    "COPY archive TO STDOUT",
    "COPY kept TO STDOUT",
    "INSERT INTO sink SELECT ssn FROM customers",
    "INSERT INTO sink SELECT secret FROM people",
    "INSERT INTO sink SELECT * FROM (SELECT shouted FROM people) q",
    "INSERT INTO sink VALUES ((SELECT s2 FROM of_view LIMIT 1))",
    "INSERT INTO sink TABLE united",
    "INSERT INTO sink SELECT peek()",
    "INSERT INTO sink VALUES ((1).spied)",
    "COPY (SELECT (1).spied) TO STDOUT",
    "COPY (SELECT ('select to_tsvector(ssn) from customers'::text).ts_stat) TO STDOUT",
    "CREATE TABLE stolen AS SELECT (n).spied FROM numbers",
    "INSERT INTO sink VALUES (peek())",
    "INSERT INTO sink SELECT to_json(c) FROM customers c",
    "INSERT INTO sink SELECT histogram_bounds::text FROM pg_stats",
    "CREATE TABLE taken AS SELECT secret FROM people",
    "CREATE TEMP TABLE taken AS TABLE people",
    "SELECT secret INTO taken FROM people",
    "CREATE MATERIALIZED VIEW taken AS SELECT secret FROM people",
    "UPDATE sink SET a = p.secret FROM people p",
    "UPDATE customers SET note = ssn",
    "UPDATE sink SET (a, b) = (SELECT secret, name FROM people LIMIT 1)",
    "MERGE INTO sink USING people p ON sink.a = p.name WHEN NOT MATCHED THEN INSERT VALUES (p.secret, '')",
    "INSERT INTO customers (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET name = customers.ssn",
    "WITH q AS (SELECT secret AS x FROM people) INSERT INTO sink SELECT x FROM q",
    "WITH q AS (DELETE FROM customers RETURNING ssn AS x) INSERT INTO sink SELECT x FROM q",
    "WITH i AS (INSERT INTO sink SELECT secret FROM people RETURNING 1) SELECT * FROM i",
    "SELECT pg_notify('c', secret) FROM people",
    "SELECT set_config('my.x', secret, false) FROM people",
    "SELECT lo_from_bytea(0, secret::bytea) FROM people",
    "EXPLAIN ANALYZE INSERT INTO sink SELECT secret FROM people",
    "PREPARE p AS INSERT INTO sink SELECT secret FROM people",
    "ALTER TABLE customers RENAME COLUMN ssn TO x",
    "DO $$ BEGIN RAISE NOTICE '%', (SELECT ssn FROM customers LIMIT 1); END $$",
)

ALLOWED: Final = (
    "COPY (SELECT id, name FROM customers) TO STDOUT",
    "COPY customers (id, name) TO STDOUT",
    "COPY harmless_copy FROM STDIN",
    "COPY (SELECT id, name FROM people) TO STDOUT",
    "COPY orders TO STDOUT",
    "INSERT INTO sink SELECT name FROM customers",
    "INSERT INTO sink SELECT name FROM people",
    "INSERT INTO sink SELECT ssn FROM orders",
    "INSERT INTO sink SELECT ssn FROM other.customers",
    "INSERT INTO sink SELECT count(*), max(name) FROM customers WHERE ssn <> ''",
    "INSERT INTO customers (id, ssn) VALUES (9, 'zq7wk-0009')",
    "UPDATE customers SET ssn = reverse(ssn) WHERE id = 1",
    "UPDATE customers c SET name = p.name FROM people p WHERE p.id = c.id",
    "CREATE TABLE taken AS SELECT id, name FROM people",
    "CREATE TEMP TABLE t1 AS SELECT id, name FROM customers",
    "CREATE VIEW v1 AS SELECT ssn AS x FROM customers",
    "SELECT pg_notify('c', name) FROM customers",
)

ERRORS: Final = (
    ("SELECT ssn::int FROM customers", "22P02"),
    ("SELECT ssn::regclass FROM customers", "42P01"),
    ("SELECT ssn::regtype FROM customers", "42601"),
    ("SELECT replace(ssn, '-', '.a.b.')::regclass FROM customers", "42601"),
    ("SELECT ssn::regnamespace FROM customers", "3F000"),
    ("SELECT chr(salary::int * 10) FROM staff", "54000"),
    ("SELECT ssn::date FROM customers", "22007"),
    ("SELECT ssn::json FROM customers", "22P02"),
    ("SELECT 1 FROM customers WHERE secret_error(ssn)", "P0001"),
    ("SELECT secret::int FROM people", "22P02"),
    ("SELECT id FROM customers WHERE ssn::int = 1", "22P02"),
    ("UPDATE customers SET id = NULL", "23502"),
    ("SELECT secret_notice()", "00000"),
)
"""Statements whose error or notice quotes a masked value, and its SQLSTATE."""
