# cython: language_level=3, boundscheck=False, wraparound=False
"""A record that is encoded already, put at the end of a stream: see writer.py, which is how everybody else imports this."""

import hashlib

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcmp, memcpy

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void* data, size_t size)

cdef object _sha256 = hashlib.sha256

cdef enum:
    HEAD = 32  # a SHA-256
    NUMBER = 9  # the sequence, in msgpack
    FRAME = 36  # u32 length (little-endian), hash: audit.segment


cdef class Tail:
    """`head` is the hash of the record before, `place` what goes between the two parts of an encoded record, up to the sequence's
    value. `clean`: nothing is left of an earlier write. `cut`: what did not go into the file of the
    last write, of the records `cut_ids`."""

    cdef public int fd
    cdef public bytes head
    cdef public int64_t seq
    cdef public int64_t written
    cdef public bint clean
    cdef public bytes cut
    cdef public list cut_ids
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
        self.cut_ids = []

    def put(self, list records not None):
        """Encoded records, with one write. True where all of it is in the file. False: nothing is, or all but `cut`;
        `StreamWriter.append_many` knows what to do."""
        cdef Py_ssize_t total = 0, at = 0, size, fixed = PyBytes_GET_SIZE(self.place) + NUMBER
        cdef bytes head = self.head, front, rest
        cdef int64_t seq = self.seq
        cdef ssize_t done
        cdef int shift
        cdef Py_ssize_t place
        cdef unsigned char* text
        if not self.clean or not records:
            return self.clean
        for record in records:
            front, rest = record.front, record.rest
            total += FRAME + PyBytes_GET_SIZE(front) + fixed + PyBytes_GET_SIZE(rest)
        cdef bytearray frames = PyByteArray_FromStringAndSize(NULL, total)
        text = <unsigned char*>PyByteArray_AS_STRING(frames)
        view = memoryview(frames)
        for record in records:
            front, rest = record.front, record.rest
            size = PyBytes_GET_SIZE(front) + fixed + PyBytes_GET_SIZE(rest)
            for shift in range(4):
                text[at + shift] = (<uint32_t>size >> (8 * shift)) & 0xFF
            # What is hashed is the head before and the record: the head stands where the hash comes to stand.
            memcpy(text + at + 4, PyBytes_AS_STRING(head), HEAD)
            memcpy(text + at + FRAME, PyBytes_AS_STRING(front), PyBytes_GET_SIZE(front))
            place = at + FRAME + PyBytes_GET_SIZE(front)
            memcpy(text + place, PyBytes_AS_STRING(self.place), PyBytes_GET_SIZE(self.place))
            place += PyBytes_GET_SIZE(self.place)
            text[place] = 0xCF  # msgpack's u64
            for shift in range(8):
                text[place + 1 + shift] = (seq >> (56 - 8 * shift)) & 0xFF
            memcpy(text + place + NUMBER, PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest))
            head = _sha256(view[at + 4 : at + FRAME + size]).digest()
            memcpy(text + at + 4, PyBytes_AS_STRING(head), HEAD)
            at += FRAME + size
            seq += 1
        done = write(self.fd, text, total)
        if done <= 0:
            return False  # the long way meets the same error, and says what it is
        self.head = head
        self.seq = seq
        self.written += done
        if done < total:
            self.clean = False
            self.cut = bytes(view[done:])
            self.cut_ids = [record.id for record in records]
            return False
        return True


def check_frames(bytearray data not None, bytes head not None, Py_ssize_t max_record):
    """See audit.check. Overwrites hashes in `data`."""
    cdef unsigned char* text = <unsigned char*>PyByteArray_AS_STRING(data)
    cdef Py_ssize_t at = 0, end = len(data), size
    cdef int64_t count = 0
    cdef unsigned char said[HEAD]
    cdef bytes found
    if len(head) != HEAD:
        raise ValueError("a chain's head has 32 bytes")
    view = memoryview(data)
    while at + FRAME <= end:
        size = text[at] | (text[at + 1] << 8) | (text[at + 2] << 16) | (<Py_ssize_t>text[at + 3] << 24)
        if size > max_record or at + FRAME + size > end:
            break
        memcpy(said, text + at + 4, HEAD)
        memcpy(text + at + 4, PyBytes_AS_STRING(head), HEAD)  # what is hashed is the head before, and the record
        found = _sha256(view[at + 4 : at + FRAME + size]).digest()
        if memcmp(said, PyBytes_AS_STRING(found), HEAD) != 0:
            return head, count, at, False
        head = found
        count += 1
        at += FRAME + size
    return head, count, at, True
