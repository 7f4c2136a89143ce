class Tail:
    fd: int
    head: bytes
    seq: int
    written: int
    clean: bool
    cut: bytes
    cut_id: str
    def __init__(self, fd: int, head: bytes, seq: int, written: int, place: bytes) -> None: ...
    def put(self, record_id: str, front: bytes, rest: bytes) -> bool: ...
