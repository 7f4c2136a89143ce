"""What of an HTTP message is a credential by its name, and never enters a record: headers, members of a query or a form, JSON members."""

from __future__ import annotations

from typing import Any, Final

import re2

from sidecar.model.operation import HttpOperation

CREDENTIAL_HEADERS: Final = frozenset(
    {
        "authorization",
        "proxy-authorization",
        "cookie",
        "set-cookie",
        "x-api-key",
        "x-auth-token",
        "x-amz-security-token",
        "private-token",
        "x-vault-token",
    }
)
SECRET_QUERY: Final = ("token", "key", "secret", "password", "sig", "signature", "credential", "auth")
REMOVED: Final = "[removed]"
_NAMES: Final = (
    r"(?:pass(?:word|wd|phrase)|secret|token|api_?key|private_?key|access_?key|credential|assertion)"
)
_ANY: Final = re2.compile("(?i)" + _NAMES)
_JSON: Final = re2.compile(
    r'(?i)("[^"\\]{0,64}' + _NAMES + r'[^"\\]{0,64}"\s*:\s*)"(?:[^"\\]|\\.)*(?:"|\\?\z)'
)
_FORM: Final = re2.compile(r"(?i)((?:^|&)[^=&\s]{0,64}" + _NAMES + r"[^=&\s]{0,64}=)[^&\s]*")


def safe_target(operation: HttpOperation) -> str:
    """Path and query as sent, secrets of the query removed."""
    if not operation.query:
        return operation.raw_path
    parts = [
        f"{name}={REMOVED if any(word in name.lower() for word in SECRET_QUERY) else value}"
        for name, value in operation.query
    ]
    return operation.raw_path + "?" + "&".join(parts)


def without_credentials(text: str) -> str:
    """The values of JSON members and form fields that a name calls secret are removed. Linear in the text (RE2)."""

    if _ANY.search(text) is None:
        return text

    def member(match: Any) -> str:
        return f'{match.group(1)}"{REMOVED}"'

    def field(match: Any) -> str:
        return f"{match.group(1)}{REMOVED}"

    return str(_FORM.sub(field, _JSON.sub(member, text)))
