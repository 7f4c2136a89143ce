"""The local authority: made once, kept safely, refused where it is not safe; leaves that OpenSSL itself accepts, and no others."""

from __future__ import annotations

import concurrent.futures
import datetime
import multiprocessing
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import TrustError
from sidecar.tls import authority as module
from sidecar.tls import certificates
from sidecar.tls.authority import CERTIFICATE_FILE, KEY_FILE, Authority, Leaf, read_certificate
from sidecar.tls.names import MAX_NAMES, Permitted, valid_name

HOUR_NS = 3600 * 10**9
DAY_NS = 24 * HOUR_NS


class Clock:
    """Nanoseconds since the epoch, moved by hand."""

    def __init__(self) -> None:
        self.now_ns = 1_800_000_000 * 10**9

    def __call__(self) -> int:
        return self.now_ns


def openssl_verify(directory: Path, leaf: Leaf, *options: str, at_s: int | None = None) -> tuple[bool, str]:
    """What `openssl verify` says of a leaf, with nothing trusted but the authority of `directory`."""
    file = directory / "leaf.pem"
    file.write_bytes(leaf.certificate_chain_pem)
    moment = ["-attime", str(at_s)] if at_s is not None else []
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-no-CApath", "-no-CAstore"]
        + ["-CAfile", str(directory / CERTIFICATE_FILE), *moment, *options, str(file)],
        capture_output=True,
        text=True,
    )
    return done.returncode == 0, done.stdout + done.stderr


# -- the root


def test_made_on_first_use_and_opened_again(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    old = os.umask(0o077)
    try:
        made = Authority.open(directory, hostname="build-7")
    finally:
        os.umask(old)
    again = Authority.open(directory, hostname="another name")
    assert again.certificate == made.certificate
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes == {KEY_FILE: 0o600, CERTIFICATE_FILE: 0o644, ".lock": 0o600}
    assert read_certificate(directory) == made.certificate
    names = made.certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    assert [name.value for name in names] == ["Sidecar local authority build-7"]


def test_what_the_root_says_of_itself(tmp_path: Path) -> None:
    clock = Clock()
    made = Authority.open(tmp_path / "ca", lifetime_s=10 * 86_400, clock_ns=clock, hostname="h" * 200)
    root = made.certificate
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    assert root.public_key().curve.name == "secp256r1"  # type: ignore[union-attr]
    assert root.not_valid_after_utc.timestamp() == clock.now_ns / 1e9 + 10 * 86_400
    assert root.not_valid_before_utc.timestamp() == clock.now_ns / 1e9 - 300


def _open(directory: Path) -> str:
    return certificates.fingerprint(Authority.open(directory).certificate)


def test_of_many_processes_one_makes_it(tmp_path: Path) -> None:
    with concurrent.futures.ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
        assert len(set(pool.map(_open, [tmp_path / "ca"] * 16))) == 1


@pytest.mark.parametrize("first", [True, False], ids=["first", "regenerate"])
@pytest.mark.parametrize("step", range(12))
def test_a_crash_at_any_step_leaves_an_old_or_a_new_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, first: bool
) -> None:
    """The process dies before its nth call that changes the directory; whoever comes next has a pair, and no key is left over."""
    directory = tmp_path / "ca"
    before = None if first else Authority.open(directory).certificate
    left = step

    class Died(BaseException):
        pass

    def dying(name: str) -> None:
        original = getattr(os if hasattr(os, name) else Path, name)

        def call(*arguments: object, **options: object) -> object:
            nonlocal left
            if left == 0:
                raise Died
            left -= 1
            return original(*arguments, **options)

        monkeypatch.setattr(os if hasattr(os, name) else Path, name, call)

    for name in ("fsync", "fchmod"):
        dying(name)
    rename = Path.rename

    def dying_rename(path: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise Died
        left -= 1
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dying_rename)
    died = False
    try:
        if first:
            Authority.open(directory)
        else:
            Authority.regenerate(directory)
    except Died:
        died = True
    monkeypatch.undo()
    assert died is (step < 9)  # two of fchmod and fsync, three syncs of the directory, two renames
    found = Authority.open(directory)
    assert {path.name for path in directory.iterdir()} == {KEY_FILE, CERTIFICATE_FILE, ".lock"}
    ok, text = openssl_verify(directory, found.leaf(("a.example",)))
    assert ok, text
    if before is not None and step < 6:
        assert found.certificate == before


def test_regenerating_is_asked_for(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    old = Authority.open(directory)
    new = Authority.regenerate(directory)
    assert new.certificate != old.certificate
    assert Authority.open(directory).certificate == new.certificate
    ok, text = openssl_verify(directory, old.leaf(("a.example",)))
    assert not ok, text


# -- what is refused


def _spoil(directory: Path, kind: str) -> None:
    key, certificate = directory / KEY_FILE, directory / CERTIFICATE_FILE
    match kind:
        case "key readable":
            key.chmod(0o640)
        case "certificate writable":
            certificate.chmod(0o664)
        case "directory writable":
            directory.chmod(0o775)
        case "directory above writable":
            directory.parent.chmod(0o777)
        case "key gone":
            key.unlink()
        case "certificate gone":
            certificate.unlink()
        case "key is a link":
            key.rename(directory.parent / "elsewhere")
            key.symlink_to(directory.parent / "elsewhere")
        case "key is a pipe":
            key.unlink()
            os.mkfifo(key, 0o600)
        case "key is rubbish":
            key.write_text("hunter2\n")
        case "certificate is rubbish":
            certificate.write_text("hunter2\n")
        case "another's certificate":
            other = Authority.open(directory.parent / "other")
            certificate.write_bytes(other.certificate_pem)
        case "a leaf":
            leaf = Authority.open(directory).leaf(("a.example",))
            certificate.write_bytes(leaf.certificate_chain_pem)
            key.write_bytes(leaf.key_pem)
        case "huge":
            key.write_bytes(b"x" * 70_000)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("key readable", "can be read"),
        ("certificate writable", "can be written"),
        ("directory writable", "can be changed by others"),
        ("directory above writable", "can be changed by others"),
        ("key gone", "is missing"),
        ("certificate gone", "is missing"),
        ("key is a link", "is a link"),
        ("key is a pipe", "no small regular file"),
        ("key is rubbish", "no key"),
        ("certificate is rubbish", "no certificate"),
        ("another's certificate", "do not belong together"),
        ("a leaf", "do not belong together"),
        ("huge", "no small regular file"),
    ],
)
def test_unsafe_or_broken_files_are_refused(tmp_path: Path, kind: str, words: str) -> None:
    directory = tmp_path / "ca"
    Authority.open(directory)
    _spoil(directory, kind)
    before = {path.name: path.lstat().st_mtime_ns for path in directory.iterdir()}
    with pytest.raises(TrustError, match=words) as caught:
        Authority.open(directory)
    assert caught.value.hint
    assert caught.value.exit_code == 3
    assert "hunter2" not in f"{caught.value}{caught.value.hint}"
    assert {path.name: path.lstat().st_mtime_ns for path in directory.iterdir()} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_files_of_somebody_else_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    Authority.open(directory)
    for path in (directory / KEY_FILE, directory / CERTIFICATE_FILE, directory):
        os.chown(path, 65534, -1)
        with pytest.raises(TrustError, match=r"belongs to user 65534|changed by others"):
            Authority.open(directory)
        os.chown(path, 0, -1)
    Authority.open(directory)


def test_expired_or_not_yet_valid(tmp_path: Path) -> None:
    clock = Clock()
    made = Authority.open(tmp_path / "ca", lifetime_s=86_400, clock_ns=clock)
    clock.now_ns += DAY_NS
    with pytest.raises(TrustError, match="expired on 2027-01-16"):
        Authority.open(tmp_path / "ca", clock_ns=clock)
    with pytest.raises(TrustError, match="expired"):
        made.leaf(("a.example",))
    clock.now_ns -= 3 * DAY_NS
    with pytest.raises(TrustError, match="valid from") as caught:
        Authority.open(tmp_path / "ca", clock_ns=clock)
    assert caught.value.hint == "set this host's clock"


# -- leaves


def test_a_leaf_that_openssl_accepts(tmp_path: Path) -> None:
    made = Authority.open(tmp_path / "ca")
    leaf = made.leaf(("API.Example.", "10.1.2.3", "2001:DB8::1", "xn--bcher-kva.example", "my_service"))
    for option in (
        ("-verify_hostname", "api.example"),
        ("-verify_ip", "10.1.2.3"),
        ("-verify_ip", "2001:db8::1"),
        ("-verify_hostname", "xn--bcher-kva.example"),
        ("-verify_hostname", "my_service"),
    ):
        ok, text = openssl_verify(tmp_path / "ca", leaf, *option)
        assert ok, text
    ok, text = openssl_verify(tmp_path / "ca", leaf, "-verify_hostname", "other.example")
    assert not ok
    assert "hostname mismatch" in text
    certificate = x509.load_pem_x509_certificate(leaf.certificate_chain_pem)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_name_too_long_for_a_common_name(tmp_path: Path) -> None:
    name = ".".join(["a" * 60] * 4)
    ok, text = openssl_verify(
        tmp_path / "ca", Authority.open(tmp_path / "ca").leaf((name,)), "-verify_hostname", name
    )
    assert ok, text


def test_when_a_leaf_is_valid(tmp_path: Path) -> None:
    clock = Clock()
    now_s = clock.now_ns // 10**9
    made = Authority.open(tmp_path / "ca", lifetime_s=30 * 86_400, leaf_lifetime_s=7200, clock_ns=clock)
    leaf = made.leaf(("a.example",))
    assert leaf.not_after_ns == clock.now_ns + 2 * HOUR_NS
    for at_s, good in (
        (now_s - 301, False),
        (now_s - 299, True),
        (now_s + 7199, True),
        (now_s + 7201, False),
    ):
        ok, text = openssl_verify(tmp_path / "ca", leaf, at_s=at_s)
        assert ok is good, text
    clock.now_ns += 30 * DAY_NS - HOUR_NS
    assert made.leaf(("a.example",)).not_after_ns == 1_800_000_000 * 10**9 + 30 * DAY_NS  # the root's own end


def test_kept_until_a_third_of_its_lifetime_is_left(tmp_path: Path) -> None:
    clock = Clock()
    made = Authority.open(tmp_path / "ca", leaf_lifetime_s=86_400, clock_ns=clock)
    first = made.leaf(("a.example",))
    clock.now_ns += 16 * HOUR_NS - 1
    assert made.leaf(("A.example.",)) is first
    assert made.leaf(("b.example",)) is not first
    clock.now_ns += 1
    assert made.leaf(("a.example",)) is not first


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CACHED", 3)
    made = Authority.open(tmp_path / "ca")
    first = made.leaf(("h0.example",))
    second = made.leaf(("h1.example",))
    made.leaf(("h2.example",))
    assert made.leaf(("h0.example",)) is first
    made.leaf(("h3.example",))
    assert made.leaf(("h0.example",)) is first
    assert made.leaf(("h1.example",)) is not second


def test_many_threads(tmp_path: Path) -> None:
    made = Authority.open(tmp_path / "ca")
    start = threading.Barrier(8)

    def ask(number: int) -> list[Leaf]:
        start.wait()
        return [made.leaf((f"h{index}.example",)) for index in range(20)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert all(answer == answers[0] for answer in answers)
    serials = {
        x509.load_pem_x509_certificate(leaf.certificate_chain_pem).serial_number for leaf in answers[0]
    }
    assert len(serials) == 20


def test_no_repr_shows_a_key(tmp_path: Path) -> None:
    made = Authority.open(tmp_path / "ca")
    leaf = made.leaf(("a.example",))
    for text in (repr(made), str(made), repr(leaf), str(leaf), f"{leaf}"):
        assert "PRIVATE" not in text
        assert leaf.key_pem.decode().splitlines()[1] not in text
    assert b"PRIVATE" in leaf.key_pem


REFUSED = ["", ".", "*.example", "a.*", "a b", "bücher.example", "a..b", "-a.example", "a" * 64, "a.example/x",
           "a\0.example", "a.example\n", "1.2.3", "256.1.1.1", "0x7f.1", "fe80::1%eth0", "[::1]", "10.0.0.0/8", "a.1",
           ".".join(["a" * 63] * 4)]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(TrustError):
        Authority.open(tmp_path / "ca").leaf(("good.example", name))


def test_how_many_names(tmp_path: Path) -> None:
    made = Authority.open(tmp_path / "ca")
    made.leaf(tuple(f"h{number}.example" for number in range(MAX_NAMES)))
    for count in (0, MAX_NAMES + 1):
        with pytest.raises(TrustError, match=f"not {count}"):
            made.leaf(tuple(f"h{number}.example" for number in range(count)))


@given(st.text(max_size=300) | st.text("ab0-_.*:/%[]", max_size=30))
def test_a_name_is_refused_or_stands_as_it_is(text: str) -> None:
    try:
        name = valid_name(text)
    except TrustError:
        return
    assert valid_name(name) == name
    assert name.isascii()
    assert not set(name) & set("*/%[] \n\0")
    certificate = x509.DNSName(name)
    assert certificate.value == name


# -- constraints


@pytest.mark.parametrize(
    ("permitted", "good", "bad"),
    [
        (("corp.example",), ["corp.example", "a.b.corp.example"], ["notcorp.example", "example", "10.0.0.1", "::1"]),
        (("10.0.0.0/8",), ["10.1.2.3"], ["11.0.0.1", "2001:db8::1", "corp.example"]),
        (("corp.example", "10.0.0.0/8", "2001:db8::/32"), ["x.corp.example", "10.0.0.1", "2001:db8::9"], ["b.example", "2001:db9::9"]),
        ((), ["anything.example", "192.0.2.1"], []),
    ],
)  # fmt: skip
def test_what_it_may_vouch_for(
    tmp_path: Path, permitted: tuple[str, ...], good: list[str], bad: list[str]
) -> None:
    """Refused by us, and by OpenSSL for one that would sign nevertheless."""
    made = Authority.open(tmp_path / "ca", permitted=permitted)
    for name in good:
        ok, text = openssl_verify(tmp_path / "ca", made.leaf((name,)))
        assert ok, text
    for name in bad:
        with pytest.raises(TrustError, match="may not vouch"):
            made.leaf((name,))
    made.permitted = Permitted()
    for name in bad:
        ok, text = openssl_verify(tmp_path / "ca", made.leaf((name,)))
        assert not ok
        assert "subtree violation" in text


def test_other_constraints_than_configured(tmp_path: Path) -> None:
    Authority.open(tmp_path / "ca", permitted=("b.example", "a.example"))
    Authority.open(tmp_path / "ca", permitted=("a.example", "b.example"))
    for other in ((), ("a.example",), ("a.example", "b.example", "10.0.0.0/8")):
        with pytest.raises(TrustError, match=r"constrained to .*a\.example") as caught:
            Authority.open(tmp_path / "ca", permitted=other)
        assert "regenerate" in str(caught.value.hint)
    Authority.regenerate(tmp_path / "ca", permitted=("a.example",))
    Authority.open(tmp_path / "ca", permitted=("a.example",))


def test_dates_are_of_the_host(tmp_path: Path) -> None:
    made = Authority.open(tmp_path / "ca")
    left = made.certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=3649) < left <= datetime.timedelta(days=3650)
