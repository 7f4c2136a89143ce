# cython: language_level=3
"""A connection's receiving end: the short way through the inspector. See hop.py, which is how everybody else imports this."""

import time

from libc.stdint cimport int64_t

from sidecar.session.commands import Send, WriteRecord

cdef object _now_ns = time.time_ns


cdef class Gate:
    """Whether records go straight to the stream: `open` while a segment takes them, nothing waits for it, and no flow has to wait
    for the disk. One for all flows of a worker, which keeps it."""

    cdef public bint open
    cdef public object writer
    cdef public int64_t full

    def __init__(self, full):
        """`full`: the size from which on a segment is to be replaced."""
        self.full = full

    def set(self, writer, bint is_open):
        self.writer = writer
        self.open = is_open and writer is not None


cdef class Receiver:
    """What a chunk's way depends on. `flow` is None while nobody has said who the client is; `peer` is the other connection."""

    cdef public Gate gate
    cdef public bint from_client
    cdef public bint lost
    cdef public object flow
    cdef public object lane
    cdef public Receiver peer
    cdef public object transport
    cdef public list early

    def __init__(self, Gate gate not None, bint from_client):
        self.gate = gate
        self.from_client = from_client
        self.early = []

    def data_received(self, bytes data not None):
        cdef Receiver peer = self.peer
        cdef Gate gate = self.gate
        flow = self.flow
        lane = self.lane
        if flow is None:
            # uvloop starts reading after connection_made, whatever was paused there: one chunk comes through.
            self.early.append(data)
            self.transport.pause_reading()
            return
        if (
            lane is None
            or not gate.open
            or peer is None
            or peer.lost
            or peer.transport is None
            or not lane.armed
            or flow.closed
            or flow.blocked
        ):
            flow.received(self, data)
            return
        try:
            record = lane.client(data, _now_ns()) if self.from_client else lane.server(data, _now_ns())
            if record is None:
                flow.received(self, data)
                return
            if self.from_client:
                flow.bytes_client += len(data)
            else:
                flow.bytes_server += len(data)
            writer = gate.writer
            if not writer.put(record.id, record.front, record.rest):
                flow.carry_out([WriteRecord(record), Send(peer.side, data)])
                return
            if writer.written >= gate.full:
                flow.worker.segment_full()
            if self.from_client:
                flow.requests += 1
            peer.transport.write(data)
        except Exception:  # the worker outlives any fault of one session; the flow ends, closed
            flow.fault()
