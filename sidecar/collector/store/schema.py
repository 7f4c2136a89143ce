"""Tables of the collector's store. A change of them raises SCHEMA_VERSION."""

from __future__ import annotations

from typing import Final

SCHEMA_VERSION: Final = 2

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS hosts (
  host TEXT PRIMARY KEY, key BLOB NOT NULL, first_ns INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS streams (
  stream TEXT PRIMARY KEY, host TEXT NOT NULL, boot TEXT NOT NULL,
  last INTEGER NOT NULL, head BLOB NOT NULL, ended TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS batches (
  stream TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
  header BLOB NOT NULL, sig BLOB NOT NULL, PRIMARY KEY (stream, first, last));
CREATE TABLE IF NOT EXISTS records (
  stream TEXT NOT NULL, seq INTEGER NOT NULL, id TEXT NOT NULL, short TEXT NOT NULL,
  flow TEXT NOT NULL, kind TEXT NOT NULL, ts_ns INTEGER NOT NULL, body BLOB NOT NULL,
  PRIMARY KEY (stream, seq));
CREATE INDEX IF NOT EXISTS records_flow ON records (flow, ts_ns, stream, seq);
CREATE INDEX IF NOT EXISTS records_short ON records (short);
CREATE TABLE IF NOT EXISTS flows (
  flow TEXT PRIMARY KEY, ts_ns INTEGER NOT NULL, host TEXT NOT NULL,
  who TEXT NOT NULL DEFAULT '', process TEXT NOT NULL DEFAULT '', target TEXT NOT NULL DEFAULT '',
  protocol TEXT NOT NULL DEFAULT '', requests INTEGER NOT NULL DEFAULT 0, denied INTEGER NOT NULL DEFAULT 0,
  held INTEGER NOT NULL DEFAULT 0, masked INTEGER NOT NULL DEFAULT 0, rows INTEGER NOT NULL DEFAULT 0,
  closed TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS flows_time ON flows (ts_ns DESC);
"""
