"""Every command, file and setting that README.md names exists, and its examples are valid."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import yaml
from msgspec import inspect

from sidecar.cli import COMMANDS, cli
from sidecar.config import ConfigurationDocument, load_config
from sidecar.policy import load_policy

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.M | re.S)
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)


def _yaml_blocks() -> list[str]:
    return [text for language, text in FENCES if language == "yaml"]


def _settings(struct: type[msgspec.Struct], prefix: str = "") -> set[str]:
    """Dotted names of all settings, and of the sections that hold them."""
    found: set[str] = set()
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    for field in info.fields:
        name = f"{prefix}{field.encode_name}"
        found.add(name)
        options: list[Any] = list(getattr(field.type, "types", [field.type]))
        for option in options:
            option = getattr(option, "item_type", option)
            if isinstance(option, inspect.StructType):
                found |= _settings(option.cls, name + ".")
    return found


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def test_named_scripts_exist_and_can_be_run() -> None:
    names = set(re.findall(r"(?<![\w/])(?:\./)?(scripts/[\w-]+)", README))
    assert {"scripts/quickstart", "scripts/test"} <= names
    assert [name for name in sorted(names) if not os.access(ROOT / name, os.X_OK)] == []


def test_exactly_two_set_up_commands() -> None:
    section = README.partition("## Set-up\n")[2].partition("\n## ")[0]
    block = re.search(r"^```sh\n(.*?)^```", section, flags=re.M | re.S)
    assert block is not None
    commands = [line.partition("#")[0].strip() for line in block[1].splitlines() if line.strip()]
    assert commands == ["./scripts/quickstart", "./scripts/test"]


def test_all_commands_are_in_the_table_and_no_others() -> None:
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `sidecar ")]
    named = {name for row in rows for name in re.findall(r"`sidecar (\w+)", row)}
    assert named == set(COMMANDS)


def test_sub_commands_and_options_exist() -> None:
    context = click.Context(cli)
    for text in INLINE + [
        line for language, block in FENCES if language == "sh" for line in block.splitlines()
    ]:
        match = re.search(r"(?:^|/| )sidecar (\w+)(?: (\w+))?(.*)", text)
        if match is None or match[1] not in COMMANDS:
            continue
        command = cli.get_command(context, match[1])
        assert command is not None
        if isinstance(command, click.Group) and match[2]:
            assert match[2] in command.list_commands(context), text
            inner = command.get_command(context, match[2])
            assert inner is not None
            command = inner
        known = {option for parameter in command.params for option in parameter.opts}
        used = re.findall(r"(?<!\S)--?[a-z][\w-]*", match[3].partition(" -- ")[0])
        assert set(used) <= known, text


@pytest.mark.parametrize("text", _yaml_blocks())
def test_yaml_examples_are_valid(text: str, tmp_path: Path) -> None:
    if "rules" in yaml.safe_load(text):
        policy = load_policy(text, "README.md")
        results = policy.run_tests()
        assert results
        assert [result for result in results if not result.ok] == []
        return
    (tmp_path / "policy.yaml").write_text("version: 1\ndefault: allow\n", encoding="utf-8")
    file = tmp_path / "sidecar.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_config(file).file == file


def test_named_settings_exist() -> None:
    known = _settings(ConfigurationDocument)
    sections = {name for name in known if "." not in name}
    named = [
        text
        for text in INLINE
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", text) and text.split(".")[0] in sections
    ]
    assert len(named) >= 3
    assert [name for name in named if name not in known] == []
