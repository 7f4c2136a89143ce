"""Sans-io codecs: bytes to messages and back. Nothing here reads a socket or a clock."""
