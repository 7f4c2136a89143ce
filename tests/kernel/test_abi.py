"""The layouts of bpf/include/abi.h and of sidecar/kernel/abi.py are the same: compared through the C compiler."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from sidecar.kernel import abi, loader

pytestmark = pytest.mark.root


def test_sizes_and_offsets(tmp_path: Path) -> None:
    lines = []
    for name, struct in abi.STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        lines += [
            f'printf("{name}.{field[0]} %zu\\n", offsetof(struct {name}, {field[0]}));'
            for field in struct._fields_
        ]
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\ntypedef unsigned char u8; typedef unsigned short u16;\n"
        "typedef unsigned int u32; typedef unsigned long long u64;\n"
        f'#include "{loader.source_directory()}/include/abi.h"\nint main(void) {{ {" ".join(lines)} return 0; }}\n'
    )
    subprocess.run(["gcc", "-o", str(tmp_path / "layout"), str(source)], check=True)
    said = dict(
        line.split()
        for line in subprocess.run(
            [str(tmp_path / "layout")], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    )
    for name, struct in abi.STRUCTS.items():
        assert int(said[name]) == ctypes.sizeof(struct), name
        for field in struct._fields_:
            assert int(said[f"{name}.{field[0]}"]) == getattr(struct, field[0]).offset, f"{name}.{field[0]}"
