"""The variables with which runtimes that have trust stores of their own are told about the local authority.

A variable that names a bundle replaces what the runtime trusts: its file always holds the system's roots, or the person's own, besides
ours. What the person has set is respected: their file plus ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from sidecar.errors import TrustError
from sidecar.tls import bundles

log = logging.getLogger("sidecar")

ADDS: Final = (
    "NODE_EXTRA_CA_CERTS",  # Node: besides the roots that are compiled in
    "DENO_CERT",  # Deno: the same
)
"""Their file is added to the runtime's own roots: the authority alone."""
REPLACES: Final = (
    "SSL_CERT_FILE",  # OpenSSL and what is built on it, Go, Ruby, httpx, uv, rustls-native-certs
    "REQUESTS_CA_BUNDLE",  # Python requests: certifi otherwise
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "PIP_CERT",
    "AWS_CA_BUNDLE",  # AWS CLI and SDKs
    "NPM_CONFIG_CAFILE",
    "CARGO_HTTP_CAINFO",
    "BUNDLE_SSL_CA_CERT",  # Ruby's bundler
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",  # gcloud
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",  # gRPC's C core, and with it Python's
    "HTTPLIB2_CA_CERTS",
    "HEX_CACERTS_PATH",  # Elixir's package manager
    "NIX_SSL_CERT_FILE",
    "PERL_LWP_SSL_CA_FILE",
)
"""Their file is instead of the runtime's own roots: the system's plus ours."""

AUTHORITY_FILE: Final = "authority.pem"
BUNDLE_FILE: Final = "bundle.pem"


def variables(authority_certificate: Path, bundle: Path | None) -> dict[str, str]:
    """Name to value. `authority_certificate` is a file with ours alone; `bundle` one with the system's roots plus ours, None where the
    system has no roots: then nothing is set that would replace a runtime's own."""
    found = {name: str(authority_certificate) for name in ADDS}
    if bundle is not None:
        found |= {name: str(bundle) for name in REPLACES}
    return found


def for_command(
    environ: Mapping[str, str], certificate_pem: bytes, directory: Path, *, root: Path = Path("/")
) -> dict[str, str]:
    """What to set for a command whose own environment is `environ`; the files that it names are written to `directory`, which is made.

    Covers variables that are not set, and those that name a file of certificates without ours: they get that file plus ours. A
    variable whose file cannot be read stays as it is, with a warning. Raises OSError.
    """
    directory.mkdir(mode=0o755, exist_ok=True)
    directory.chmod(0o755)
    ours = _write(directory / AUTHORITY_FILE, certificate_pem)
    system = bundles.system_bundle(root)
    bundle: Path | None = None
    if system is not None:
        data = bundles.read_bounded(system)
        if bundles.holds(data, certificate_pem):
            bundle = system  # after `sidecar ca install`: the distribution goes on updating it
        else:
            bundle = _write(directory / BUNDLE_FILE, bundles.combined(data, certificate_pem))
    else:
        log.warning("this system has no roots that are trusted: only Node and Deno are told of the authority")
    wanted = variables(ours, bundle)
    theirs: dict[str, str | None] = {}
    found: dict[str, str] = {}
    for name, value in wanted.items():
        set_as = _name_in(environ, name)
        own = environ.get(set_as, "")
        if not own:
            found[set_as] = value
            continue
        if own not in theirs:
            theirs[own] = _with_ours(
                set_as, own, certificate_pem, directory / f"bundle-{len(theirs) + 1}.pem"
            )
        combined = theirs[own]
        if combined is not None:
            found[set_as] = combined
    return found


def _name_in(environ: Mapping[str, str], name: str) -> str:
    """npm reads its variables in any case, and people write them in lower case."""
    if name.startswith("NPM_CONFIG_"):
        return next((key for key in environ if key.lower() == name.lower()), name)
    return name


def _with_ours(name: str, own: str, certificate_pem: bytes, path: Path) -> str | None:
    """The file that `name` is to name: theirs plus ours; None: it stays as it is.

    We read as root what the person named. Nothing but certificates goes on from there, so that no secret does.
    """
    try:
        data = bundles.read_bounded(Path(own))
        if bundles.holds(data, certificate_pem):
            return None
        return str(_write(path, bundles.combined(data, certificate_pem)))
    except (OSError, ValueError, TrustError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        log.warning("%s=%s stays as it is, without the local authority: %s", name, own, why)
        return None


def _write(path: Path, data: bytes) -> Path:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o644)  # the command's user reads it, whatever our umask
        file.write(data)
    return path
