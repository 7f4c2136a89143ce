"""YAML documents to typed structs, with the line of every problem and the nearest valid name.

PyYAML composes (so that positions are known), msgspec converts (so that types are strict). Sizes, depth and aliases are bounded:
a document comes from an administrator, but a mistake must not hang the agent.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Final, TypeVar

import msgspec
import yaml

from sidecar.errors import ConfigurationError

T = TypeVar("T")

MAX_DOCUMENT_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 32
MAX_NODES: Final = 100_000

_SIZES: Final = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "kib": 1024,
    "m": 10**6,
    "mb": 10**6,
    "mib": 2**20,
    "g": 10**9,
    "gb": 10**9,
    "gib": 2**30,
    "t": 10**12,
    "tb": 10**12,
    "tib": 2**40,
}
_DURATIONS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

_YAML_HINTS: Final = (
    # what PyYAML says -> what people mostly did
    ("'\\t'", "indent with spaces, not with tabs"),
    ("mapping values are not allowed", "quote a text that holds `: `, and indent keys of one level alike"),
    ("expected alphabetic or numeric character", 'quote a value that begins with * or &: "*.internal"'),
    ("expected <block end>", "indent keys and list items of one level alike"),
    ("cannot start any token", "quote a value that begins with % @ or `"),
    ("special characters are not allowed", "save the file as plain UTF-8 text"),
    ("found unexpected end of stream", "a quote is opened and never closed"),
    (
        "expected ',' or",
        "a bracket is opened and not closed before this, or a text that holds { } [ ] is not quoted",
    ),
)
_KINDS: Final = {
    # msgspec's word -> what stands in the document
    "object": "a mapping (name: value)",
    "array": "a list",
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "nothing",
}

FEW: Final = 8
"""Valid words that a hint names in full beside the nearest."""

Lines = dict[tuple[str | int, ...], int]


def parse_size(value: str | int) -> int:
    """`1GiB`, `64 MiB`, `65536` → bytes. Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError("a size is a number of bytes, such as 65536 or 1GiB")
    if isinstance(value, int):
        if value < 0:
            raise ValueError("a size is not negative")
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if not match or match[2].lower() not in _SIZES:
        raise ValueError(f"{value!r} is no size; write 65536, 64KiB or 1GiB")
    return int(float(match[1]) * _SIZES[match[2].lower()])


def parse_duration(value: str | int | float) -> float:
    """`15m`, `500ms`, `1h`, `30` (seconds) → seconds. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < 0:
            raise ValueError("a duration is not negative")
        return float(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*", str(value))
    if not match:
        raise ValueError(f"{value!r} is no duration; write 30s, 15m or 1h")
    return float(match[1]) * _DURATIONS[match[2]]


class _Reader:
    """Builds plain data and remembers the line of every path."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: Lines = {}
        self.nodes = 0

    def build(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        self.nodes += 1
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if len(path) > MAX_DEPTH or self.nodes > MAX_NODES:
            raise ConfigurationError(
                "the document is nested too deeply or is too large", file=self.file, line=line
            )
        if isinstance(node, yaml.MappingNode):
            found: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key_line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ConfigurationError("a key is a plain word", file=self.file, line=key_line)
                key = self._scalar(key_node)
                if key in found:
                    raise ConfigurationError(f"`{key}` stands twice", file=self.file, line=key_line)
                self.lines[(*path, key)] = key_line
                found[key] = self.build(value_node, (*path, key))
            return found
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag == "tag:yaml.org,2002:timestamp":
            return (
                node.value
            )  # a date is text here: whoever needs one reads it, and says what is wrong with it
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigurationError(
                f"this value cannot be read: {error}", file=self.file, line=node.start_mark.line + 1
            ) from error
        finally:
            loader.dispose()


def _check_events(text: str, file: str) -> None:
    """Bounds before anything is built: the scanner's time grows with the square of the depth."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else None
        if isinstance(event, yaml.AliasEvent):
            raise ConfigurationError(
                "aliases (*name) are not used here; write the value out", file=file, line=line
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ConfigurationError("the document is nested too deeply", file=file, line=line)


def read_document(text: str, file: str) -> tuple[Any, Lines]:
    """Plain data and the line (from 1) of each path. Raises ConfigurationError."""
    if len(text) > MAX_DOCUMENT_BYTES:
        raise ConfigurationError(f"the document is larger than {MAX_DOCUMENT_BYTES} bytes", file=file)
    try:
        _check_events(text, file)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigurationError(
            f"not YAML: {problem.partition(chr(10))[0]}",
            file=file,
            line=mark.line + 1 if mark else None,
            hint=_yaml_hint(problem),
        ) from error
    except RecursionError as error:
        raise ConfigurationError("the document is nested too deeply", file=file) from error
    if node is None:
        return {}, {(): 1}
    reader = _Reader(file)
    return reader.build(node, ()), reader.lines


def _yaml_hint(problem: str) -> str:
    """What people mostly did where PyYAML says `problem`."""
    for words, hint in _YAML_HINTS:
        if words in problem:
            return hint
    return "look at this line, and at the one above it"


def _path_of(message: str) -> tuple[tuple[str | int, ...], str]:
    """msgspec's ` - at `$.a.b[0]`` as a path, and the message without it."""
    match = re.search(r" - at `(?:key in )?\$([^`]*)`$", message)
    if not match:
        return (), message
    parts: list[str | int] = []
    for name, index, wild in re.findall(r"\.([^.\[]+)|\[(\d+)\]|(\[\.\.\.\])", match[1]):
        parts.append(name or (int(index) if index else wild))
    return tuple(parts), message[: match.start()]


def _line_of(lines: Lines, path: tuple[str | int, ...]) -> int:
    known = tuple(part for part in path)
    while known:
        if known in lines:
            return lines[known]
        known = known[:-1]
    return lines.get((), 1)


def _field_names(type_: Any, path: tuple[str | int, ...]) -> list[str]:
    """Field names of the struct at `path` inside `type_`, for suggestions."""
    structs = [info for info in _types_at(type_, path) if isinstance(info, msgspec.inspect.StructType)]
    return sorted({item.encode_name for info in structs for item in info.fields})


def nearest(word: str, valid: list[str]) -> str | None:
    """The closest valid name, or None: `stop` is not taken for `drop`, nor `version` for `steering`."""
    found = difflib.get_close_matches(word, valid, n=1, cutoff=0.55)
    return found[0] if found else None


def suggestion(word: str, valid: list[str]) -> str:
    """A hint: the closest of `valid`, and all of them where they are few."""
    near = nearest(word, valid)
    every = "valid: " + ", ".join(valid)
    if near is None:
        return every
    return f"did you mean `{near}`?" + (f" {every}" if len(valid) <= FEW else "")


def load_document(text: str, file: str, type_: type[T]) -> T:
    """Parse and convert. Every problem is a ConfigurationError with file, line and, for names, the nearest valid one."""
    data, lines = read_document(text, file)
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as error:
        path, message = _path_of(str(error))
        unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message)
        if unknown:
            word = unknown[1]
            names = _field_names(type_, path)
            near = nearest(word, names)
            line = _line_of(lines, (*path, word))
            raise ConfigurationError(
                f"`{word}` is not known here",
                file=file,
                line=line,
                path=".".join(map(str, (*path, word))),
                hint=f"did you mean `{near}`?" if near else "valid names: " + ", ".join(names),
            ) from error
        hint = None
        enum = re.fullmatch(r"Invalid enum value '?(.*?)'?", message)
        expected = re.fullmatch(r"Expected `([^`]*)`, got `([^`]*)`", message)
        missing = re.fullmatch(r"Object missing required field `(.*)`", message)
        if enum:
            message = f"'{enum[1]}' is not valid here"
            hint = suggestion(enum[1], [*_options(type_, path), *_mappings(type_, path)])
        elif expected:
            options = [*_options(type_, path), *_mappings(type_, path)]
            shapes = _shapes(type_, path)
            message, hint = _expected(expected[1], expected[2], options, shapes)
        elif missing:
            options = _options(type_, (*path, missing[1]))
            message = f"`{missing[1]}` is missing"
            hint = f"add `{missing[1]}: {'|'.join(options) or '…'}`"
        where = ".".join(map(str, path))
        raise ConfigurationError(
            f"{where}: {message}" if where else message,
            file=file,
            line=_line_of(lines, path),
            path=where,
            hint=hint,
        ) from error


def _expected(wanted: str, found: str, options: list[str], shapes: list[str]) -> tuple[str, str | None]:
    """msgspec's types in the words of whoever writes YAML, and what to do."""
    kinds = [_KINDS.get(word.strip(), word.strip()) for word in wanted.split("|")]
    kinds = [kind for kind in kinds if kind != _KINDS["null"]] or kinds
    hint = None
    if options:
        hint = "valid: " + ", ".join(options)
    elif found == "bool" and "str" in wanted:
        hint = "YAML reads yes, no, on and off as true and false: quote it"
    elif found == "null":
        hint = "give it a value, or leave the name out"
    elif found in ("int", "float") and "str" in wanted:
        hint = "quote a number that is meant as a text"
    elif wanted.startswith("array"):
        hint = "begin each item with `- `" if found == "object" else "write [a, b], also for one"
    elif found == "str" and ("int" in wanted or "bool" in wanted):
        hint = "a number, or true or false, stands without quotes"
    elif shapes and found != "array":
        hint = "write " + " or ".join(shapes)
    elif wanted.startswith("object") and found == "array":
        hint = "name: value, one to a line and without `- `, or {name: value}"
    return f"{' or '.join(kinds)} is expected here, not {_KINDS.get(found, found)}", hint


def _types_at(type_: Any, path: tuple[str | int, ...]) -> list[Any]:
    """What may stand at `path`, as msgspec describes it; each option of a union by itself."""
    found = []
    pending: list[tuple[Any, tuple[str | int, ...]]] = [(msgspec.inspect.type_info(type_), path)]
    while pending:
        info, rest = pending.pop()
        if isinstance(info, msgspec.inspect.UnionType):
            pending += [(option, rest) for option in info.types]
        elif not rest:
            found.append(info)
        elif isinstance(info, msgspec.inspect.StructType):
            pending += [(item.type, rest[1:]) for item in info.fields if item.encode_name == rest[0]]
        elif isinstance(info, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
            pending.append((info.item_type, rest[1:]))
        elif isinstance(info, msgspec.inspect.DictType):
            pending.append((info.value_type, rest[1:]))
    return found


def _options(type_: Any, path: tuple[str | int, ...]) -> list[str]:
    """Literal values allowed at `path`."""
    literals = [info for info in _types_at(type_, path) if isinstance(info, msgspec.inspect.LiteralType)]
    return sorted({str(value) for info in literals for value in info.values})


def _mappings(type_: Any, path: tuple[str | int, ...]) -> list[str]:
    """`{cgroups: …}`: mappings that may stand at `path` instead of one of its words."""
    literal = any(isinstance(info, msgspec.inspect.LiteralType) for info in _types_at(type_, path))
    return _shapes(type_, path) if literal else []


def _shapes(type_: Any, path: tuple[str | int, ...]) -> list[str]:
    """`{file: …}`: the small mappings that may stand at `path`."""
    structs = [info for info in _types_at(type_, path) if isinstance(info, msgspec.inspect.StructType)]
    return [
        "{" + ", ".join(f"{field.encode_name}: …" for field in info.fields) + "}"
        for info in structs
        if len(info.fields) <= FEW // 2
    ]
