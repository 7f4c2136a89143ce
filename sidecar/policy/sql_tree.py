"""Reading a syntax tree of libpg_query: what stands in a node, and questions about conditions. Knows no policy."""

from __future__ import annotations

from typing import Any, Final

MAX_DEPTH: Final = 400
"""Of the tree; deeper texts are not judged (`on_unparsed`)."""


class TooDeep(Exception):
    pass


def unwrap(node: Any) -> Any:
    """The message inside a Node's oneof."""
    if node.DESCRIPTOR.name != "Node":
        return node
    which = node.WhichOneof("node")
    return getattr(node, which) if which else node


def strings(nodes: Any) -> list[str]:
    return [unwrap(node).sval for node in nodes if unwrap(node).DESCRIPTOR.name == "String"]


def find_constants(node: Any, constants: list[int], parameters: list[int], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise TooDeep
    name = node.DESCRIPTOR.name
    if name == "A_Const":
        constants.append(node.location)
        return
    if name == "ParamRef":
        parameters.append(node.number - 1)
        return
    if name in ("TypeName", "String"):
        return
    for descriptor, value in node.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE:
            for child in value if repeated(value) else (value,):
                find_constants(unwrap(child), constants, parameters, depth + 1)


def holds(node: Any, kind: str, depth: int = 0) -> bool:
    """Whether a node of that kind stands at or below `node`."""
    if depth > MAX_DEPTH:
        raise TooDeep
    if node.DESCRIPTOR.name == kind:
        return True
    return any(
        holds(unwrap(child), kind, depth + 1)
        for descriptor, value in node.ListFields()
        if descriptor.type == descriptor.TYPE_MESSAGE
        for child in (value if repeated(value) else (value,))
    )


def names_in(node: Any, depth: int) -> set[str]:
    """Every name and string at or below `node`."""
    if depth > MAX_DEPTH:
        raise TooDeep
    found: set[str] = set()
    for descriptor, value in node.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE:
            for child in value if repeated(value) else (value,):
                found |= names_in(unwrap(child), depth + 1)
        elif isinstance(value, str):
            found.add(value)
    return found


def repeated(value: Any) -> bool:
    return not hasattr(value, "DESCRIPTOR")


def column_name(node: Any) -> str:
    last = unwrap(node.fields[len(node.fields) - 1])
    return str(last.sval) if last.DESCRIPTOR.name == "String" else "*"


def filters(node: Any) -> bool:
    """Whether a condition can leave rows out: it looks at a column. `true`, `1=1`, `now() > '2000-01-01'`, `x = x` do not."""
    name = node.DESCRIPTOR.name
    if name == "BoolExpr":
        parts = [filters(unwrap(part)) for part in node.args]
        return all(parts) if int(node.boolop) == 2 else any(parts)  # 1 AND, 2 OR, 3 NOT
    if name == "CurrentOfExpr":
        return True
    if name == "A_Expr" and node.HasField("lexpr") and node.HasField("rexpr"):
        left, right = unwrap(node.lexpr), unwrap(node.rexpr)
        if left.DESCRIPTOR.name == right.DESCRIPTOR.name == "ColumnRef" and left.fields == right.fields:
            return False
    return holds(node, "ColumnRef")


def _is_constant(node: Any) -> bool:
    name = node.DESCRIPTOR.name
    if name == "A_Const":
        return True
    if name == "TypeCast":
        return _is_constant(unwrap(node.arg))
    if name == "A_Expr":
        sides = [unwrap(getattr(node, side)) for side in ("lexpr", "rexpr") if node.HasField(side)]
        return all(_is_constant(side) for side in sides)
    return False


def has_bare_constants(node: Any) -> bool:
    """Whether a condition holds a part that is only a constant: then its truth, not its shape, decides `without_where`."""
    if _is_constant(node):
        return True
    return node.DESCRIPTOR.name == "BoolExpr" and any(has_bare_constants(unwrap(part)) for part in node.args)
