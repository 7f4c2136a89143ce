"""A command line without its passwords, tokens and keys.

Command lines are recorded because they say what a job ran; what they carry in secrets must not be. The forms
that are known are removed; a secret in a form of its own cannot be told from any other word, which
docs/identity.md says. A false match costs a word of a record, a miss a secret: where in doubt, hide.
"""

from __future__ import annotations

import os
import re
from typing import Final

MASK: Final = "****"
MAX_ARGUMENT_CHARS: Final = 4096
"""What is kept of one argument: `sh -c` may carry a whole script."""
CUT: Final = "…"
MAX_NAME_CHARS: Final = 128
MIN_TOKEN_CHARS: Final = 15
"""The shortest token that is known by its form."""

_STRONG: Final = (
    r"password|passwd|passphrase|passcode|secret|token|credential|bearer|mysql_pwd|api[-_]?key|access[-_]?key|account[-_]?key|"
    r"private[-_]?key|signing[-_]?key|encryption[-_]?key|session[-_]?key|shared[-_]?access[-_]?signature"
)
"""Hidden wherever they stand in a name: `PGPASSWORD`, `--db-password`, `client_secret`."""
_WEAK: Final = r"pass|pwd|auth|authorization|creds?|cookie|jwt|sas"
"""Hidden only as a word of their own: `--auth`, `REDISCLI_AUTH`, but not `--author`."""
_SECRET: Final = rf"(?:{_STRONG}|(?<![a-z0-9])(?:{_WEAK})(?![a-z]))[\w.-]{{0,40}}"
_QUOTED: Final = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_OPEN: Final = r"\"(?:[^\"\\]|\\.)*\\?$|'(?:[^'\\]|\\.)*\\?$"
_BARE: Final = r"[^\s;&,\"']"
_VALUE: Final = (
    rf"(?:(?:{_QUOTED})(?:{_BARE}|{_QUOTED})*(?:{_OPEN})?|{_OPEN}|{_BARE}(?:{_BARE}|\"[^\"\s]*\"|'[^'\s]*')*)"
)
"""A value as a shell, libpq or JSON would write it: pieces side by side, quoted or not; an open quote goes to the
end. Behind a bare piece, a quote with blanks in it is taken for one that encloses the whole."""

_HINTS: Final = tuple(
    [
        "pass",
        "pwd",
        "secret",
        "token",
        "cred",
        "bearer",
        "key",
        "auth",
        "cookie",
        "jwt",
        "sas",
        "sign",
        "identi",
    ]
)
"""One of these stands in whatever the patterns below match: most arguments hold none, and cost
no more than this."""

# Repetitions inside a name are bounded, so that a hostile argument costs linear time.
_ASSIGNED: Final = re.compile(rf"(?i)({_SECRET})([\"']?\s{{0,8}}(?:=|:(?!//))\s{{0,8}})({_VALUE})")
_FOLLOWED: Final = re.compile(rf"(?i)^--?[\w.-]{{0,40}}?{_SECRET}$")
_FOLLOWED_INSIDE: Final = re.compile(rf"(?i)(?<=\s)(--?[\w.-]{{0,40}}?{_SECRET})(\s{{1,8}})({_VALUE})")
_HARMLESS: Final = re.compile(
    r"(?i)(?:^--?(?:no-?password|ask-?pass(?:word)?|prompt-?pass(?:word)?|no-?auth|anyauth|proxy-?anyauth)$)|"
    r"(?:[-_.](?:file|path|dir|stdin|prompt|store|jar|url|uri|endpoint|type|mode|method|length|ttl|expiry)$)"
)
"""Names that speak of a secret and hold none."""
_URL: Final = re.compile(
    r"(?i)(?<![a-z0-9+.-])([a-z][a-z0-9+.-]{0,30}://)([^/\s@'\"?#:]*)(?::([^/\s'\"]*))?@"
)
_HEADER_NAME: Final = (
    r"(?:(?:proxy-)?authorization|(?:set-)?cookie|(?:private|job|deploy)-token|(?:[\w-]{1,20}-)?api-?key|"
    r"x-[\w-]{0,30}?(?:token|key|auth|secret|signature|identity|credential)[\w-]{0,30})"
)
_HEADER_WHOLE: Final = re.compile(rf"(?i)^(-H)?({_HEADER_NAME})(\s*[:=]\s*)(.+)$", re.DOTALL)
_HEADER_INSIDE: Final = re.compile(rf"(?i)(?<![\w-])({_HEADER_NAME})(\s{{0,8}}:\s{{0,8}})([^'\"\r\n]+)")
_JWT: Final = re.compile(r"\beyJ[\w-]{6,}\.[\w-]+(?:\.[\w-]*)?")
_KNOWN_TOKEN: Final = re.compile(
    r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|"
    r"sk_(?:live|test)_\w{10,}|npm_[A-Za-z0-9]{20,}|hv[sb]\.[\w-]{20,}|dckr_pat_[\w-]{16,})"
)
_PEM: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL
)
_SQL: Final = re.compile(
    r"(?i)\b((?:password|identified\s+by(?:\s+password)?)\s+)('(?:[^']|'')*'|\"[^\"]*\")"
)

_MYSQL: Final = ("", "dump", "admin", "import", "check", "show", "sh", "-dump", "-admin", "-import", "-check")
_LDAP: Final = ("ldapsearch", "ldapmodify", "ldapadd", "ldapdelete", "ldapwhoami")
_MONGO: Final = ("mongo", "mongosh", "mongodump", "mongorestore", "mongoexport")
_SHORT_JOINED: Final = {
    **{prefix + suffix: "-p" for prefix in ("mysql", "mariadb") for suffix in _MYSQL},
    **dict.fromkeys(_LDAP, "-w"),
    **dict.fromkeys(_MONGO, "-p"),
    **dict.fromkeys(("sshpass", "7z", "7za"), "-p"),
    **dict.fromkeys(("sqlcmd", "bcp", "unzip", "zip"), "-P"),
    "redis-cli": "-a",
}
"""Programs whose one-letter option carries a password, joined to it."""
_SHORT_SEPARATE: Final = {
    **{name: (option,) for name, option in _SHORT_JOINED.items() if name not in ("7z", "7za")},
    **{prefix + suffix: () for prefix in ("mysql", "mariadb") for suffix in _MYSQL},
    "docker": ("-p",),
    "podman": ("-p",),
    "snmpget": ("-A", "-X"),
    "snmpwalk": ("-A", "-X"),
}
"""The same, standing apart. `docker login -p` (`docker run -p 80:80` loses its port in the record, which is
no loss)."""
_USER_AND_PASSWORD: Final = {
    "curl": (("-u", "--user", "-U", "--proxy-user"), ("-u", "-U")),
    "http": (("-a", "--auth"), ("-a",)),
    "https": (("-a", "--auth"), ("-a",)),
    "lftp": (("-u", "--user"), ()),
    "smbclient": (("-U", "--user"), ("-U",)),
}
"""Programs with an option `user:password` (or `user%password`, `user,password`): its forms apart, and
joined."""


def redact_cmdline(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The command line as it may be recorded."""
    if not arguments:
        return ()
    program = os.path.basename(arguments[0]).lower()
    joined = _SHORT_JOINED.get(program)
    separate = _SHORT_SEPARATE.get(program, ())
    pair_apart, pair_joined = _USER_AND_PASSWORD.get(program, ((), ()))
    found: list[str] = []
    following = ""
    for argument in arguments:
        if following == "secret":
            # an option's value that is itself an option was none: `--password --host x` prompts
            following = ""
            if not argument.startswith("--"):
                found.append(MASK)
                continue
        elif following == "pair":
            following = ""
            found.append(_pair(argument))
            continue
        if argument in separate:
            following = "secret"
            found.append(argument)
        elif joined and argument.startswith(joined) and len(argument) > 2 and not argument.startswith("--"):
            found.append(joined + MASK)
        elif argument in pair_apart:
            following = "pair"
            found.append(argument)
        elif argument[:2] in pair_joined and len(argument) > 2:
            found.append(argument[:2] + _pair(argument[2:]))
        elif len(argument) <= MAX_NAME_CHARS and _FOLLOWED.match(argument) and not _HARMLESS.search(argument):
            following = "secret"
            found.append(argument)
        else:
            found.append(redact_text(argument))
    return tuple(found)


def redact_text(text: str) -> str:
    """One argument, or the text of a script in it."""
    cut = len(text) > MAX_ARGUMENT_CHARS
    if cut:
        text = text[:MAX_ARGUMENT_CHARS]
    if "://" in text:
        text = _URL.sub(_url, text)
    lowered = text.lower()
    if any(hint in lowered for hint in _HINTS):
        text = _PEM.sub(MASK, text)
        text = _HEADER_WHOLE.sub(rf"\1\2\3{MASK}", text)
        text = _HEADER_INSIDE.sub(rf"\1\2{MASK}", text)
        text = _ASSIGNED.sub(_value, text)
        text = _FOLLOWED_INSIDE.sub(_value, text)
        text = _SQL.sub(rf"\1{MASK}", text)
    if len(text) >= MIN_TOKEN_CHARS:
        text = _JWT.sub(MASK, text)
        text = _KNOWN_TOKEN.sub(MASK, text)
    return text + CUT if cut else text


def _value(match: re.Match[str]) -> str:
    return match[0] if _HARMLESS.search(match[1]) else match[1] + match[2] + MASK


def _pair(text: str) -> str:
    for separator in (":", "%", ","):
        user, found, _ = text.partition(separator)
        if found:
            return redact_text(user) + separator + MASK
    return redact_text(text)


def _url(match: re.Match[str]) -> str:
    """`scheme://user:password@` keeps the user; `scheme://token@` keeps nothing that may be one."""
    scheme, user, password = match[1], match[2], match[3]
    if password is not None:
        return f"{scheme}{user}:{MASK}@"
    return match[0] if len(user) < 20 else f"{scheme}{MASK}@"
