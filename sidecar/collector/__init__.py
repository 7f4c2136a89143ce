"""The upstream: takes signed batches, verifies, stores, answers with receipts; web pages and API. Knows of the rest only records."""
