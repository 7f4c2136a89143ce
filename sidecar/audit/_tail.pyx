# cython: language_level=3, boundscheck=False, wraparound=False
"""A record that is encoded already, put at the end of a stream: see writer.py, which is how everybody else imports this."""

import hashlib

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec* iov, int count)

cdef object _sha256 = hashlib.sha256

cdef enum:
    HEAD = 32  # a SHA-256
    FRAME = 36  # u32 length (little-endian), hash: audit.segment


cdef class Tail:
    """`head` is the hash of the record before, `place` what goes between the two parts of an encoded record, up to the sequence's
    value. `clean`: nothing is left of an earlier write. `cut`: what did not go into the file of the record `cut_id`."""

    cdef public int fd
    cdef public bytes head
    cdef public int64_t seq
    cdef public int64_t written
    cdef public bint clean
    cdef public bytes cut
    cdef public str cut_id
    cdef bytes place

    def __init__(self, int fd, bytes head not None, int64_t seq, int64_t written, bytes place not None):
        if len(head) != HEAD:
            raise ValueError("a chain's head has 32 bytes")
        self.fd = fd
        self.head = head
        self.seq = seq
        self.written = written
        self.place = place
        self.clean = True
        self.cut = b""
        self.cut_id = ""

    def put(self, str record_id not None, bytes front not None, bytes rest not None):
        """True where all of it is in the file. False: nothing is, or all but `cut`; `StreamWriter.append` knows what to do."""
        cdef Py_ssize_t size, at, whole
        cdef ssize_t done
        cdef int shift
        cdef unsigned char frame[FRAME]
        cdef unsigned char number[9]
        cdef iovec parts[2]
        cdef char* text
        if not self.clean:
            return False
        size = PyBytes_GET_SIZE(front) + PyBytes_GET_SIZE(self.place) + 9 + PyBytes_GET_SIZE(rest)
        # One buffer for what is hashed: the head before, and the record, of which only the latter is written.
        cdef bytes hashed = PyBytes_FromStringAndSize(NULL, HEAD + size)
        text = PyBytes_AS_STRING(hashed)
        memcpy(text, PyBytes_AS_STRING(self.head), HEAD)
        at = HEAD
        memcpy(text + at, PyBytes_AS_STRING(front), PyBytes_GET_SIZE(front))
        at += PyBytes_GET_SIZE(front)
        memcpy(text + at, PyBytes_AS_STRING(self.place), PyBytes_GET_SIZE(self.place))
        at += PyBytes_GET_SIZE(self.place)
        number[0] = 0xCF  # msgpack's u64
        for shift in range(8):
            number[1 + shift] = (self.seq >> (56 - 8 * shift)) & 0xFF
        memcpy(text + at, number, 9)
        at += 9
        memcpy(text + at, PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest))
        cdef bytes digest = _sha256(hashed).digest()
        for shift in range(4):
            frame[shift] = (<uint32_t>size >> (8 * shift)) & 0xFF
        memcpy(frame + 4, PyBytes_AS_STRING(digest), HEAD)
        parts[0].iov_base = frame
        parts[0].iov_len = FRAME
        parts[1].iov_base = text + HEAD
        parts[1].iov_len = size
        whole = FRAME + size
        done = writev(self.fd, parts, 2)
        if done <= 0:
            return False  # the long way meets the same error, and says what it is
        self.head = digest
        self.seq += 1
        self.written += done
        if done < whole:
            self.clean = False
            self.cut = (PyBytes_FromStringAndSize(<char*>frame, FRAME) + hashed[HEAD:])[done:]
            self.cut_id = record_id
            return False
        return True
