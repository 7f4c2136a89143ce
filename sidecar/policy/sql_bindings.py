"""Which constants and parameters belong to which column, so that records can leave out what is masked; and which are secrets.

A constant in one expression with a column may be that column's value. What a subquery, a CTE or VALUES hands on may reach any column of
the statement: it belongs to `*`, all columns of the tables that the statement names.
"""

from __future__ import annotations

from typing import Any, Final

from sidecar.policy.sql_facts import ANY_COLUMN, SECRET, Analysis
from sidecar.policy.sql_tree import find_constants, unwrap

SECRET_FUNCTIONS: Final = frozenset(
    {"crypt", "hmac", "encrypt", "decrypt", "encrypt_iv", "decrypt_iv", "pgp_sym_encrypt", "pgp_sym_encrypt_bytea",
     "pgp_sym_decrypt", "pgp_sym_decrypt_bytea", "pgp_pub_decrypt", "pgp_pub_decrypt_bytea", "dblink_connect",
     "dblink_connect_u", "pg_create_subscription"}
)  # fmt: skip
"""Their arguments are passwords, keys and connection strings."""
FIRST_IS_SECRET: Final = frozenset({"dblink", "dblink_exec", "dblink_open", "dblink_send_query"})
"""With several arguments, the first may be a connection string."""
PAIRS_MAX: Final = 10_000
"""Of columns with constants; where an INSERT … SELECT has more, its constants belong to `*`."""


class Bindings:
    found: Analysis

    def _bind(self, column: str, value: Any) -> None:
        """Every constant and parameter in `value` belongs to `column`."""
        constants: list[int] = []
        parameters: list[int] = []
        find_constants(value, constants, parameters, 0)
        self.found.bound_literals += [(column, offset) for offset in constants]
        self.found.bound_parameters += [(column, number) for number in parameters]

    def _bind_inserted(self, node: Any) -> None:
        """By position where the source is VALUES or one plain SELECT; else any of the columns may get any of the values."""
        columns = [unwrap(target).name for target in node.cols]
        if node.HasField("with_clause"):
            self._bind_to_each(columns, node.with_clause)
        if not node.HasField("select_stmt"):
            return
        source = unwrap(node.select_stmt)
        rows = [list(unwrap(row).items) for row in source.values_lists]
        if source.HasField("with_clause"):
            self._bind_to_each(columns, source.with_clause)
        if not rows and int(source.op) <= 1:
            rows = [[unwrap(target).val for target in source.target_list]]
            for part in source.from_clause:
                self._bind_to_each(columns, unwrap(part))
        elif not rows:
            self._bind_to_each(columns, source)
        for row in rows:
            for index, value in enumerate(row):
                self._bind(columns[index] if index < len(columns) else ANY_COLUMN, unwrap(value))

    def _bind_to_each(self, columns: list[str], node: Any) -> None:
        constants: list[int] = []
        parameters: list[int] = []
        find_constants(node, constants, parameters, 0)
        if len(columns) * (len(constants) + len(parameters)) > PAIRS_MAX:
            columns = []
        for column in columns or [ANY_COLUMN]:
            self.found.bound_literals += [(column, offset) for offset in constants]
            self.found.bound_parameters += [(column, number) for number in parameters]

    def _bind_handed_on(self, node: Any) -> None:
        """A SELECT inside another statement: what it makes of constants, that statement may store or compare."""
        for row in node.values_lists:
            for value in unwrap(row).items:
                self._bind(ANY_COLUMN, unwrap(value))
        for target in node.target_list:
            self._bind(ANY_COLUMN, unwrap(unwrap(target).val))

    def _ColumnDef(self, node: Any) -> None:
        for constraint in node.constraints:
            self._bind(node.colname, unwrap(constraint))

    def _bind_secrets(self, names: list[str], node: Any) -> None:
        """Of a function call."""
        arguments = [unwrap(argument) for argument in node.args]
        if names[-1] in FIRST_IS_SECRET and len(arguments) > 1:
            arguments = arguments[:1]
        elif names[-1] == "set_config":
            arguments = arguments[1:2] if arguments and SECRET.search(_text(arguments[0])) else []
        elif names[-1] not in SECRET_FUNCTIONS:
            return
        for argument in arguments:
            self._bind("password", argument)


def _text(node: Any) -> str:
    """Of a string constant; what is computed may be any secret's name."""
    if node.DESCRIPTOR.name == "A_Const" and node.HasField("sval"):
        return str(node.sval.sval)
    return "secret"
