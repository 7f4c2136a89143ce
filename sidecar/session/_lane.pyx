# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The short way of a PostgreSQL session: see postgres_lane.py, which is how everybody else imports this.

Every index into a chunk is compared with the chunk's length, or with an inner bound that was, before it is read. Every record is
written into one static buffer whose room was compared with the sum of all that can be put into it (`_room`). Nothing is called
back while the buffer is in use.
"""

import hashlib
import os
from collections import deque

import msgspec

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from sidecar.model.record import RECORD_VERSION, EncodedRecord

ctypedef const unsigned char* bytes_t

cdef enum:
    CHUNK_MAX = 8192
    OUT_MAX = 65536
    ID_SIZE = 36
    ROWS_MAX = 1024
    TEXTS_MAX = 512
    FIXED = 256  # of a record: what is neither a piece nor a value

CHUNK_MAX_BYTES = CHUNK_MAX

cdef bytes DESCRIBED = b"D\0\0\0\x06P\0" b"E\0\0\0\x09\0\0\0\0\0" b"S\0\0\0\x04"
cdef bytes EXECUTED = b"E\0\0\0\x09\0\0\0\0\0" b"S\0\0\0\x04"
cdef bytes BOUND = b"2\0\0\0\x04"
cdef bytes PARSED = b"1\0\0\0\x04" b"2\0\0\0\x04"
cdef bytes NO_DATA = b"n\0\0\0\x04"
cdef bytes READY = b"Z\0\0\0\x05"

cdef object _encode = msgspec.msgpack.Encoder().encode
cdef object _sha256 = hashlib.sha256
cdef bytes _SLOT = b"\xc1\xc1sidecar\xc1\xc1"  # what differs from record to record; 0xC1 is no msgpack and occurs in no UTF-8
cdef object _RAW = msgspec.Raw(_SLOT)
SLOT = _RAW

cdef unsigned char out[OUT_MAX]
cdef Py_ssize_t used = 0
cdef uint64_t random_state = int.from_bytes(os.urandom(8), "big")


cdef class Pieces:
    """One kind of record, cut where single records differ: `front`, id, `after_id`, time; then, after what the stream writer puts
    there, `rest` with values between."""

    cdef bytes front
    cdef bytes after_id
    cdef tuple rest
    cdef Py_ssize_t size

    def __init__(self, record):
        record.v = RECORD_VERSION
        record.id = record.ts_ns = record.host = record.stream = record.seq = _RAW
        cut = _encode(record).split(_SLOT)
        self.front = cut[0]
        self.after_id = cut[1]
        self.rest = tuple(cut[5:])
        self.size = sum(len(piece) for piece in cut)


cdef class Answer:
    """How the answers of one description are recorded: with rows, and without any."""

    cdef Pieces rows
    cdef Pieces empty

    def __init__(self, rows, empty):
        self.rows = Pieces(rows)
        self.empty = Pieces(empty)


cdef class Known:
    """A statement that may pass here. `bare` is for answers that no description goes before, `bare_rows` whether these may have
    rows. `answer` belongs to `description`, the last RowDescription that was seen (a whole message)."""

    cdef public object decision
    cdef public bytes raw
    cdef public bint query
    cdef Pieces request
    cdef Answer bare
    cdef bint bare_rows
    cdef bytes description
    cdef Answer answer

    def __init__(self, decision, bytes raw, request, Answer bare not None, *, bint query, bint bare_rows):
        self.decision = decision
        self.raw = raw
        self.query = query
        self.request = Pieces(request)
        self.bare = bare
        self.bare_rows = bare_rows
        self.description = b""


cdef class Cycle:
    """One statement that was sent and is not answered yet. `chunk` is what the client sent."""

    cdef public bytes chunk
    cdef public Known known
    cdef public str record_id
    cdef public object started_ns
    cdef public bint parsed
    cdef public bint described


cdef class Lane:
    """One connection's. `armed`: nothing else is under way; only then may `client` and `server` be called. See postgres_lane."""

    cdef public object owner
    cdef public bint armed
    cdef public int64_t until_ns
    cdef public object cycles
    cdef public bytes status
    cdef public Py_ssize_t sent
    cdef public Py_ssize_t bytes_client
    cdef public Py_ssize_t bytes_server
    cdef public Known confirmed
    cdef public Cycle executed
    cdef dict names
    cdef dict texts
    cdef bint parsed
    cdef Py_ssize_t max_rows
    cdef Py_ssize_t max_bytes

    def __init__(self, owner, max_rows, max_bytes):
        self.owner = owner
        self.max_rows = min(max_rows, ROWS_MAX)
        self.max_bytes = max_bytes
        self.cycles = deque()
        self.names = {}
        self.texts = {}
        self.status = b"I"

    def arm(self, bytes status):
        self.armed = True
        self.status = status
        self.sent = self.bytes_client = self.bytes_server = 0
        self.parsed = False
        self.confirmed = None
        self.executed = None
        self.names.clear()
        self.texts.clear()

    cdef Known _query(self, bytes raw):
        """What the session says of a text holds for all of its shape, but for strings, in which there may be secrets."""
        cdef Known known
        cdef bytes key = None
        if memchr(PyBytes_AS_STRING(raw), 0x27, PyBytes_GET_SIZE(raw)) == NULL:
            key = shape(raw)
            if key is not None:
                known = self.texts.get(key)
                if known is not None:
                    return known
        known = self.owner.known_query(raw)
        if known is not None and key is not None and self.owner.known_shape(raw):
            if len(self.texts) >= TEXTS_MAX:
                self.texts.clear()
            self.texts[key] = known
        return known

    cdef Known _parse(self, bytes raw):
        cdef tuple key = (raw,)
        cdef Known known = self.texts.get(key)
        if known is None:
            known = self.owner.known_parse(raw)
            if known is not None:
                if len(self.texts) >= TEXTS_MAX:
                    self.texts.clear()
                self.texts[key] = known
        return known

    def client(self, bytes data not None, now_ns):
        """The record of a chunk that is exactly one statement; once it is written, the chunk may be sent."""
        cdef bytes_t at = <bytes_t>PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t begin = 0, stop, bound = 0, tail
        cdef bint parsed = False, described = False
        cdef Known known
        cdef Pieces pieces
        cdef bytes name
        cdef Cycle cycle
        if self.owner is None or size < 6 or size > CHUNK_MAX or <int64_t>now_ns >= self.until_ns:
            return None
        if at[0] == 0x51:  # Query
            if 1 + <Py_ssize_t>_uint32(at + 1) != size or at[size - 1] != 0:
                return None
            known = self._query(data[5 : size - 1])
            if known is None:
                return None
        else:
            if at[0] == 0x50:  # Parse, of the unnamed statement
                begin = 1 + <Py_ssize_t>_uint32(at + 1)
                if begin < 7 or begin + 12 > size or at[5] != 0:
                    return None
                stop = _find_nul(at, 6, begin)
                if stop < 0:
                    return None
                known = self._parse(data[6:stop])
                if known is None:
                    return None
                parsed = True
            else:
                known = None
            if begin + 12 > size or at[begin] != 0x42 or at[begin + 5] != 0:  # Bind, of the unnamed portal
                return None
            bound = begin + 1 + <Py_ssize_t>_uint32(at + begin + 1)
            if bound < begin + 12 or bound >= size:
                return None
            tail = size - bound
            described = tail == PyBytes_GET_SIZE(DESCRIBED) and memcmp(at + bound, PyBytes_AS_STRING(DESCRIBED), tail) == 0
            if not described and not (
                tail == PyBytes_GET_SIZE(EXECUTED) and memcmp(at + bound, PyBytes_AS_STRING(EXECUTED), tail) == 0
            ):
                return None
            stop = _find_nul(at, begin + 6, bound)
            if stop < 0:
                return None
            if parsed:
                if stop != begin + 6:
                    return None
            else:
                name = data[begin + 6 : stop]
                known = self.names.get(name)
                if known is None:
                    if stop == begin + 6 and self.parsed:
                        return None
                    known = self.owner.known_statement(name)
                    if known is None:
                        return None
                    self.names[name] = known
            if not (described or known.bare_rows):
                return None
            stop += 1
        pieces = known.request
        if not _room(pieces, size):
            return None
        # The part after the writer's comes first: it may turn out that there is none.
        global used
        used = 0
        _put(pieces.rest[0])
        if known.query:
            _put_string(at + 5, size - 6)
        elif not _put_parameters(at, stop, bound):
            return None
        _put(pieces.rest[1])
        cycle = Cycle.__new__(Cycle)
        cycle.chunk = data
        cycle.known = known
        cycle.started_ns = now_ns
        cycle.parsed = parsed
        cycle.described = described
        record = _finish("request", pieces, now_ns, cycle)
        if parsed:
            self.names.pop(b"", None)
            self.parsed = True
        self.sent += 1
        self.bytes_client += size
        self.cycles.append(cycle)
        return record

    def server(self, bytes data not None, now_ns):
        """The record of a chunk that is exactly the oldest statement's answer; then the chunk may be sent."""
        cdef bytes_t at = <bytes_t>PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t end = size - 6, offset = 0, after, first, row, rows = 0
        cdef Cycle cycle
        cdef Known known
        cdef Answer answer, found
        cdef Pieces pieces
        cdef bytes before, digest
        cdef bint may_have_rows
        cdef int64_t elapsed
        if self.owner is None or not self.cycles or end < 6 or size > CHUNK_MAX:
            return None
        if memcmp(at + end, PyBytes_AS_STRING(READY), 5) != 0:
            return None
        cycle = self.cycles[0]
        known = cycle.known
        answer = known.bare
        may_have_rows = known.bare_rows
        if not known.query:
            before = PARSED if cycle.parsed else BOUND
            offset = PyBytes_GET_SIZE(before)
            if offset + 5 > end or memcmp(at, PyBytes_AS_STRING(before), offset) != 0:
                return None
        if at[offset] == 0x54:  # RowDescription
            if not (known.query or cycle.described):
                return None
            after = offset + 1 + <Py_ssize_t>_uint32(at + offset + 1)
            if after < offset + 5 or after >= end:
                return None
            if after - offset != PyBytes_GET_SIZE(known.description) or (
                memcmp(at + offset, PyBytes_AS_STRING(known.description), after - offset) != 0
            ):
                found = self.owner.answer_for(known, data[offset + 5 : after])
                if found is None:
                    return None
                known.answer = found
                known.description = data[offset:after]
            answer = known.answer
            may_have_rows = True
            offset = after
        elif cycle.described:
            if offset + 5 > end or memcmp(at + offset, PyBytes_AS_STRING(NO_DATA), 5) != 0:
                return None
            may_have_rows = False
            offset += 5
        first = offset
        while offset + 7 <= end and at[offset] == 0x44:  # DataRow
            after = offset + 1 + <Py_ssize_t>_uint32(at + offset + 1)
            if after < offset + 7 or after > end:
                return None
            rows += 1
            offset = after
        if rows and (not may_have_rows or rows > self.max_rows or offset - first > self.max_bytes):
            return None
        # CommandComplete, up to ReadyForQuery; its tag is ASCII.
        if offset + 6 > end or at[offset] != 0x43 or at[end - 1] != 0:
            return None
        if offset + 1 + <Py_ssize_t>_uint32(at + offset + 1) != end or not _is_ascii(at, offset + 5, end - 1):
            return None
        pieces = answer.rows if rows else answer.empty
        if not _room(pieces, size):
            return None
        elapsed = now_ns - cycle.started_ns
        digest = b""
        if rows:
            digest = _sha256(data[first:offset]).hexdigest().encode()
        global used
        used = 0
        _put(pieces.rest[0])
        _put_id(cycle.record_id)
        _put(pieces.rest[1])
        _put_string(at + offset + 5, end - 1 - offset - 5)
        _put(pieces.rest[2])
        if rows:
            _put_uint64(rows)
            _put(pieces.rest[3])
            _put_uint64(offset - first)
            _put(pieces.rest[4])
            _put_array(rows)
            row = first
            while row < offset:
                after = row + 1 + <Py_ssize_t>_uint32(at + row + 1)
                if not _put_row(at, row + 5, after):
                    return None
                row = after
            _put(pieces.rest[5])
            _put_byte(0xD9)
            _put_byte(64)
            _put(digest)
            _put(pieces.rest[6])
        _put_uint64(elapsed if elapsed > 0 else 0)
        _put(pieces.rest[7] if rows else pieces.rest[3])
        record = _finish("response", pieces, now_ns, None)
        self.cycles.popleft()
        self.status = data[end + 5 : size]
        self.bytes_server += size
        if not known.query:
            self.executed = cycle
            if cycle.parsed:
                self.confirmed = known
        return record


cdef object _finish(str kind, Pieces pieces, now_ns, Cycle cycle):
    """The record, of which the buffer holds the later part; `cycle` is told the record's id."""
    global used
    cdef bytes rest = PyBytes_FromStringAndSize(<char*>out, used)
    cdef str record_id = _new_id(now_ns)
    if cycle is not None:
        cycle.record_id = record_id
    used = 0
    _put(pieces.front)
    _put_id(record_id)
    _put(pieces.after_id)
    _put_uint64(now_ns)
    return EncodedRecord(kind, record_id, PyBytes_FromStringAndSize(<char*>out, used), rest)


# -- reading


cdef inline uint32_t _uint32(bytes_t at) noexcept:
    return (<uint32_t>at[0] << 24) | (<uint32_t>at[1] << 16) | (<uint32_t>at[2] << 8) | <uint32_t>at[3]


cdef inline int _uint16(bytes_t at) noexcept:
    return (at[0] << 8) | at[1]


cdef inline Py_ssize_t _find_nul(bytes_t at, Py_ssize_t begin, Py_ssize_t end) noexcept:
    if begin >= end:
        return -1
    cdef bytes_t found = <bytes_t>memchr(at + begin, 0, end - begin)
    return -1 if found == NULL else found - at


cdef inline bint _is_ascii(bytes_t at, Py_ssize_t begin, Py_ssize_t end) noexcept:
    cdef Py_ssize_t index
    for index in range(begin, end):
        if at[index] >= 0x80:
            return False
    return True


# -- writing. `_room` has seen to it that all of a record fits.


cdef inline bint _room(Pieces pieces, Py_ssize_t chunk) noexcept:
    """A value is never longer in msgpack than in the protocol: there its length takes four bytes, here at most five, of which a row's
    own head pays one."""
    return pieces.size + 2 * chunk + FIXED <= OUT_MAX


cdef inline void _put_byte(int value) noexcept:
    global used
    out[used] = <unsigned char>value
    used += 1


cdef inline void _put_raw(bytes_t at, Py_ssize_t size) noexcept:
    global used
    memcpy(out + used, at, size)
    used += size


cdef inline void _put(bytes piece):
    _put_raw(<bytes_t>PyBytes_AS_STRING(piece), PyBytes_GET_SIZE(piece))


cdef inline void _put_uint64(int64_t value) noexcept:
    cdef int shift
    _put_byte(0xCF)
    for shift in range(56, -8, -8):
        _put_byte((value >> shift) & 0xFF)


cdef inline void _put_size(int small, int small_max, int one, int two, Py_ssize_t size) noexcept:
    """The head of a string, of bytes or of an array: `small` with the size in it, or one or two bytes more (size < 65,536)."""
    if size < small_max:
        _put_byte(small | <int>size)
    elif one and size < 256:
        _put_byte(one)
        _put_byte(<int>size)
    else:
        _put_byte(two)
        _put_byte(<int>(size >> 8))
        _put_byte(<int>(size & 0xFF))


cdef inline void _put_array(Py_ssize_t count) noexcept:
    _put_size(0x90, 16, 0, 0xDC, count)


cdef inline void _put_string(bytes_t at, Py_ssize_t size) noexcept:
    _put_size(0xA0, 32, 0xD9, 0xDA, size)
    _put_raw(at, size)


cdef inline void _put_binary(bytes_t at, Py_ssize_t size) noexcept:
    _put_size(0, 0, 0xC4, 0xC5, size)
    _put_raw(at, size)


cdef bint _put_text(bytes_t at, Py_ssize_t size) except -1:
    """str, or bin where it is not UTF-8."""
    if _is_ascii(at, 0, size):
        _put_string(at, size)
        return True
    try:
        PyBytes_FromStringAndSize(<char*>at, size).decode()
    except UnicodeDecodeError:
        _put_binary(at, size)
    else:
        _put_string(at, size)
    return True


cdef bint _put_parameters(bytes_t at, Py_ssize_t offset, Py_ssize_t bound) except -1:
    """A Bind from its parameters' formats to its end. False where it is not well-formed."""
    cdef Py_ssize_t formats, codes, count, index, length, results
    cdef int form
    if offset + 2 > bound:
        return False
    formats = _uint16(at + offset)
    codes = offset + 2
    offset = codes + 2 * formats
    if offset + 2 > bound:
        return False
    count = _uint16(at + offset)
    offset += 2
    if formats > 1 and formats != count:
        return False
    _put_array(count)
    for index in range(count):
        if offset + 4 > bound:
            return False
        length = _uint32(at + offset)
        offset += 4
        if length == 0xFFFFFFFF:
            _put_byte(0xC0)
            continue
        if length > bound - offset:
            return False
        form = 0
        if formats == 1:
            form = _uint16(at + codes)
        elif formats:
            form = _uint16(at + codes + 2 * index)
        if form:
            _put_binary(at + offset, length)
        else:
            _put_text(at + offset, length)
        offset += length
    if offset + 2 > bound:
        return False
    results = _uint16(at + offset)
    return offset + 2 + 2 * results == bound


cdef bint _put_row(bytes_t at, Py_ssize_t offset, Py_ssize_t after) except -1:
    """A DataRow's body. False where it is not well-formed."""
    cdef Py_ssize_t count = _uint16(at + offset), index, length
    offset += 2
    _put_array(count)
    for index in range(count):
        if offset + 4 > after:
            return False
        length = _uint32(at + offset)
        offset += 4
        if length == 0xFFFFFFFF:
            _put_byte(0xC0)
            continue
        if length > after - offset:
            return False
        _put_text(at + offset, length)
        offset += length
    return offset == after


# -- identifiers: UUIDv7 as model.ids makes them


cdef uint64_t _random() noexcept:
    """splitmix64 (Steele, Lea, Flood 2014): identifiers are no secrets."""
    global random_state
    cdef uint64_t z
    random_state += <uint64_t>0x9E3779B97F4A7C15
    z = random_state
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


cdef str _new_id(now_ns):
    cdef char text[ID_SIZE]
    cdef const char* digits = "0123456789abcdef"
    cdef uint64_t high, low
    cdef int64_t now = now_ns
    cdef int index, shift, place = 0
    high = (<uint64_t>(now // 1000000) << 16) | 0x7000 | (_random() & 0x0FFF)
    low = (_random() & <uint64_t>0x3FFFFFFFFFFFFFFF) | <uint64_t>0x8000000000000000
    for index in range(32):
        if index == 8 or index == 12 or index == 16 or index == 20:
            text[place] = 0x2D
            place += 1
        shift = 60 - 4 * (index & 15)
        text[place] = digits[((high if index < 16 else low) >> shift) & 15]
        place += 1
    return text[:ID_SIZE].decode("ascii")


cdef inline void _put_id(str record_id):
    cdef bytes text = record_id.encode("ascii")
    _put_byte(0xD9)
    _put_byte(ID_SIZE)
    _put(text)


# -- the shape of a text


cdef inline bint _word(int char) noexcept:
    """A character of identifiers."""
    return 0x61 <= char <= 0x7A or 0x41 <= char <= 0x5A or 0x30 <= char <= 0x39 or char == 0x5F or char == 0x24


def shape(bytes raw not None):
    """The text with its whole numbers and plain strings taken out: two texts of one shape are the same tokens but for these. None
    where anything is in it that takes more than a look to tell (comments, other quoting, other numbers, other alphabets)."""
    cdef bytes_t at = <bytes_t>PyBytes_AS_STRING(raw)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(raw), index = 0
    cdef int char, following, before = 0x20
    global used
    if size > CHUNK_MAX or not _is_ascii(at, 0, size):
        return None
    used = 0
    while index < size:
        char = at[index]
        following = at[index + 1] if index + 1 < size else 0
        if char == 0x5C or char == 0x22 or char == 0x24:
            return None  # \ " $
        if char == 0x2D and following == 0x2D or char == 0x2F and following == 0x2A:
            return None  # -- /*
        if char == 0x26 and following == 0x27:
            return None  # U&'…'
        if char == 0x2E and 0x30 <= following <= 0x39:
            return None  # .5
        if char == 0x27:  # '
            if _word(before):
                return None  # E'…', B'…', X'…', N'…'
            index += 1
            while True:
                if index >= size or at[index] == 0x5C:
                    return None
                if at[index] != 0x27:
                    index += 1
                elif index + 1 < size and at[index + 1] == 0x27:
                    index += 2
                else:
                    break
            index += 1
            before = 0x27
            _put_byte(0x27)
            _put_byte(0x27)
            continue
        if 0x30 <= char <= 0x39 and not _word(before):
            index += 1
            while index < size and 0x30 <= at[index] <= 0x39:
                index += 1
            if index < size and (at[index] == 0x2E or _word(at[index])):
                return None  # 1.5, 1e3, 0x1f, 1_000
            before = 0x30
            _put_byte(0x30)
            continue
        _put_byte(char)
        before = char
        index += 1
    return PyBytes_FromStringAndSize(<char*>out, used)
