"""A real loop, to see what steering costs: medians of one query and of one request, as JSON."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable

import httpx
import psycopg

QUERIES = 400
REQUESTS = 150
WARM_UP = 20


def median_us(act: Callable[[], object], times: int) -> float:
    for _ in range(WARM_UP):
        act()
    taken = []
    for _ in range(times):
        begin = time.perf_counter_ns()
        act()
        taken.append((time.perf_counter_ns() - begin) / 1000)
    return round(statistics.median(taken), 1)


def main() -> None:
    begin = time.perf_counter_ns()
    with psycopg.connect(autocommit=True) as database, httpx.Client(base_url=os.environ["SHOP_API"]) as api:
        connect_ms = (time.perf_counter_ns() - begin) / 1e6
        query = median_us(
            lambda: database.execute("SELECT name, ssn FROM customers WHERE id = %s", (3,)).fetchone(),
            QUERIES,
        )
        request = median_us(
            lambda: api.get("/v1/customers", params={"limit": 2}).raise_for_status(), REQUESTS
        )
    print(json.dumps({"connect_ms": round(connect_ms, 1), "query_us": query, "request_us": request}))


if __name__ == "__main__":
    main()
