"""CEL expressions (cel-spec), bounded: a policy's author cannot make every statement of a host slow. The only module that imports
celpy. `matches` is RE2, and takes no longer than its text."""

from __future__ import annotations

import logging
from typing import Any, Final

import celpy
import lark
from celpy.evaluation import Evaluator

MAX_CHARS: Final = 4_096
"""Of an expression. cel-go's default for generated parsers is far above what a rule needs; so is this."""
MAX_STEPS: Final = 3_000
"""Nodes evaluated for one answer, those in every round of a macro too. A comparison is some 25, and 30 us each are usual."""
MAX_ITEMS: Final = 1_000
"""Of a list that an expression sees."""
_REFUSED: Final = frozenset({"reduce"})
"""No CEL, an extension of celpy's: it can double a string in every round."""

FIELDS: Final = {
    "operation": (
        "protocol", "text", "database", "user", "statements", "reads", "writes", "functions",
        "method", "host", "path", "query", "headers",
    ),
    "target": ("host", "port", "address", "name"),
    "principal": ("issuer", "subject"),
    "workload": ("uid", "exe", "cgroup"),
}  # fmt: skip
"""The names that an expression of a policy sees (`selectors.cel_facts`)."""
_MACROS: Final = frozenset({"map", "filter", "all", "exists", "exists_one"})

# celpy reports what fails together with the values: those are statements and headers.
logging.getLogger("celpy").setLevel(logging.CRITICAL + 1)


class _TooCostly(Exception):
    pass


class _Bounded(Evaluator):  # type: ignore[misc]
    """Counts what it visits, together with the evaluators of its macros."""

    def __init__(self, ast: Any, activation: Any, steps: list[int]) -> None:
        super().__init__(ast, activation)
        self._steps = steps

    def sub_evaluator(self, ast: Any) -> Evaluator:
        return _Bounded(ast, self.activation, self._steps)

    def visit(self, tree: Any) -> Any:
        self._steps[0] += 1
        if self._steps[0] > MAX_STEPS:
            raise _TooCostly
        return super().visit(tree)


class _Runner(celpy.InterpretedRunner):  # type: ignore[misc]
    def evaluate(self, context: Any) -> Any:
        return _Bounded(self.ast, self.new_activation(), [0]).evaluate(context)


class Expression:
    """Compiled once. Raises ValueError for what cannot be, or is too large."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARS:
            raise ValueError(f"the expression has {len(text)} characters, the limit is {MAX_CHARS}")
        environment = celpy.Environment(runner_class=_Runner)
        try:
            tree = environment.compile(text)
            names = {str(token) for token in tree.scan_values(lambda token: isinstance(token, lark.Token))}
            self._program = environment.program(tree)
        except celpy.CELParseError as error:
            place = f" (line {error.line}, column {error.column})" if error.column else ""
            raise ValueError(str(error.args[0]).strip().splitlines()[0] + place) from error
        except RecursionError as error:
            raise ValueError("the expression is nested too deeply") from error
        refused = sorted(names & _REFUSED)
        if refused:
            raise ValueError(f"`{refused[0]}` is not supported")
        self.names = _names_in(tree)
        """(`operation`, `path`) for `operation.path`, and (name, None) for a name by itself, in the order of the text."""

    def evaluate(self, facts: dict[str, Any]) -> bool | None:
        """None: it failed, cost too much, or is no boolean."""
        if any(
            isinstance(value, list) and len(value) > MAX_ITEMS
            for part in facts.values()
            for value in part.values()
        ):
            return None
        try:
            answer = self._program.evaluate(celpy.json_to_cel(facts))
        except (celpy.CELEvalError, _TooCostly, ValueError, TypeError, KeyError, RecursionError):
            return None
        return bool(answer) if isinstance(answer, bool | celpy.celtypes.BoolType) else None


def _names_in(tree: Any) -> tuple[tuple[str, str | None], ...]:
    """What an expression refers to; the variables of its macros are left out."""
    bound: set[str] = set()
    found: dict[tuple[str, str | None], None] = {}
    for node in tree.iter_subtrees_topdown():
        if node.data == "member_dot_arg" and str(node.children[1]) in _MACROS and len(node.children) > 2:
            variables = node.children[2].children[0].scan_values(lambda token: token.type == "IDENT")
            bound.update(str(token) for token in variables)
        elif node.data == "member_dot" and (root := _plain_name(node.children[0])):
            found[root, str(node.children[1])] = None
        elif node.data in ("ident", "dot_ident"):
            found[str(node.children[0]), None] = None
    return tuple(name for name in found if name[0] not in bound)


def _plain_name(node: Any) -> str | None:
    """`operation` of the tree `member(primary(ident))`."""
    while isinstance(node, lark.Tree) and node.data in ("member", "primary") and len(node.children) == 1:
        node = node.children[0]
    return (
        str(node.children[0]) if isinstance(node, lark.Tree) and node.data in ("ident", "dot_ident") else None
    )
