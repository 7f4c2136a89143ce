from sidecar.model.record import EncodedRecord

class Tail:
    fd: int
    head: bytes
    seq: int
    written: int
    clean: bool
    cut: bytes
    cut_ids: list[str]
    def __init__(self, fd: int, head: bytes, seq: int, written: int, place: bytes) -> None: ...
    def put(self, records: list[EncodedRecord]) -> bool: ...

def check_frames(data: bytearray, head: bytes, max_record: int) -> tuple[bytes, int, int, bool]: ...
