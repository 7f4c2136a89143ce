#!/usr/bin/env bash
# The shop's nightly report, as it has run for years: psql, curl and a bit of Python, one shared password, no idea of Sidecar.
#
# Reads PGHOST, PGDATABASE, PGUSER, PGPASSWORD as every libpq program does, and SHOP_API (http://host:port).
set -u
cd "$(dirname "$(readlink -f "$0")")" || exit 1
export PSQLRC=/dev/null PAGER=
query() { psql --no-align --tuples-only --field-separator='  ' "$@" 2>&1; }

echo "# customers"
query --command "SELECT id, name, email, ssn FROM customers ORDER BY id LIMIT 3"

echo "# customers, from the API"
curl --silent --show-error "$SHOP_API/v1/customers?limit=2"
echo

echo "# cleaning up"
# One session: psql goes on after an error, and so does this job.
query << 'SQL'
DROP TABLE report_archive;
DELETE FROM orders;
SELECT 'orders: ' || count(*) FROM orders;
SQL

echo "# a customer asked to be forgotten"
query --command "DELETE FROM customers WHERE id = 5"

echo "# an old client, by its old API call"
curl --silent --show-error --request DELETE "$SHOP_API/v1/customers/4"
echo

echo "# totals"
"${PYTHON:-python3}" nightly_totals.py
