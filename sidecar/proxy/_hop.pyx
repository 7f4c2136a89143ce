# cython: language_level=3
"""A connection's receiving end: the short way through the inspector. See hop.py, which is how everybody else imports this."""

import time

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t
from uvloop.loop import TCPTransport

from sidecar.session.commands import Send, WriteRecord

cdef extern from "sys/socket.h":
    ssize_t send(int descriptor, const void *data, size_t size, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef object _now_ns = time.time_ns


cdef class Gate:
    """The short way's end of the stream, one for all flows of a worker, which keeps it. `open` while a segment takes records,
    nothing waits for it, and no flow has to wait for the disk. `waiting` are answers that were handed on in this turn of the loop:
    they are written before the next request's record, with it, or at the turn's end."""

    cdef public bint open
    cdef public object writer
    cdef public int64_t full
    cdef public list waiting
    cdef object _soon
    cdef object _failed
    cdef bint _scheduled

    def __init__(self, full, soon, failed):
        """`full`: the size from which on a segment is to be replaced. `soon(callback)`: at the turn's end. `failed()`: what waits
        could not be written."""
        self.full = full
        self.waiting = []
        self._soon = soon
        self._failed = failed

    def set(self, writer, bint is_open):
        self.writer = writer
        self.open = is_open and writer is not None

    def take(self):
        """What waits; the caller writes it."""
        taken, self.waiting = self.waiting, []
        return taken

    def flush(self):
        self._scheduled = False
        if self.waiting and not self._put(self.waiting):
            self._failed()

    cdef bint _put(self, list records) except -1:
        if not self.open or not self.writer.put(records):
            return False
        if records is self.waiting:
            self.waiting = []
        return True

    cdef bint request(self, record) except -1:
        """Write what waits, and this. False: this is not written, and what waits still does."""
        if not self.waiting:
            return self._put([record])
        self.waiting.append(record)
        if self._put(self.waiting):
            return True
        self.waiting.pop()
        return False

    cdef answer(self, record):
        self.waiting.append(record)
        if not self._scheduled:
            self._scheduled = True
            self._soon(self.flush)


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
    cdef object _looked_at
    cdef int _descriptor

    def __init__(self, Gate gate not None, bint from_client):
        self.gate = gate
        self.from_client = from_client
        self.early = []
        self._descriptor = -1

    cdef hand_on(self, bytes data):
        """Send at once, where nothing waits to be sent before: a transport sends at the turn's end, behind the records. What the kernel
        does not take now is the transport's, and so is all of it where the connection is not plain TCP (TLS, for one)."""
        cdef ssize_t sent
        transport = self.transport
        if transport is not self._looked_at:
            self._looked_at = transport
            self._descriptor = -1
            if type(transport) is TCPTransport:
                self._descriptor = transport.get_extra_info("socket").fileno()
        if self._descriptor >= 0 and not transport.is_closing() and transport.get_write_buffer_size() == 0:
            sent = send(
                self._descriptor, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), MSG_DONTWAIT | MSG_NOSIGNAL
            )
            if sent == PyBytes_GET_SIZE(data):
                return
            if sent > 0:
                data = data[sent:]
        transport.write(data)

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
            if not self.from_client:
                flow.bytes_server += len(data)
                peer.hand_on(data)
                gate.answer(record)
                return
            flow.bytes_client += len(data)
            if not gate.request(record):
                flow.carry_out([WriteRecord(record), Send(peer.side, data)])
                return
            if gate.writer.written >= gate.full:
                flow.worker.segment_full()
            flow.requests += 1
            peer.hand_on(data)
        except Exception:  # the worker outlives any fault of one session; the flow ends, closed
            flow.fault()
