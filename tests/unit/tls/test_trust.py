"""Installing in the trust stores of other systems' trees, with their tools, and taking it out byte for byte."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sidecar.errors import TrustError
from sidecar.tls import bundles, certificates, snapshots, stores, trust
from sidecar.tls.authority import Authority
from sidecar.tls.inside import inside
from tests.support import system_tree

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not system_tree.available(), reason="needs root, busybox-static and ca-certificates"),
]

LAYOUTS = ("debian", "rhel", "alpine", "bundle")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.open(tmp_path / "ca")


@pytest.fixture(params=LAYOUTS)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return system_tree.make(tmp_path / "root", request.param)


def bundle(root: Path) -> bytes:
    found = bundles.system_bundle(root)
    assert found is not None
    return found.read_bytes()


def test_installed_and_taken_out(root: Path, authority: Authority) -> None:
    before = system_tree.fingerprint(root)
    public = bundles.certificates_in(bundle(root))
    report = trust.install(authority.certificate_pem, root)
    assert report.failed == []
    assert set(bundles.certificates_in(bundle(root))) == {*public, authority.certificate_pem}
    leaf = root.parent / "leaf.pem"
    leaf.write_bytes(authority.leaf(("a.example",)).certificate_chain_pem)
    own = root / "etc/sidecar"
    assert (own / "ca.pem").read_bytes() == authority.certificate_pem
    seen = inside(root, "/etc/sidecar/ca-bundle.pem")
    done = subprocess.run(
        ["openssl", "verify", "-no-CApath", "-CAfile", str(seen), str(leaf)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("=") for line in (own / "ca.env").read_text().splitlines()[1:])
    assert lines["NODE_EXTRA_CA_CERTS"] == "/etc/sidecar/ca.pem"
    assert lines["REQUESTS_CA_BUNDLE"] == "/etc/sidecar/ca-bundle.pem"
    for path in own.iterdir():
        assert path.stat(follow_symlinks=False).st_mode & 0o022 == 0 or path.is_symlink()
    after = system_tree.fingerprint(root)
    assert not (root / "dev/null").exists()
    again = trust.install(authority.certificate_pem, root)
    assert again.done == ["installed already: nothing to do"]
    assert system_tree.fingerprint(root) == after
    trust.uninstall(root)
    assert system_tree.fingerprint(root) == before | {
        name: entry for name, entry in system_tree.fingerprint(root).items() if name in ("var", "var/lib")
    }
    assert trust.uninstall(root).done == ["not installed: nothing to do"]


def test_another_authority_takes_its_place(root: Path, authority: Authority, tmp_path: Path) -> None:
    trust.install(authority.certificate_pem, root)
    other = Authority.open(tmp_path / "other")
    trust.install(other.certificate_pem, root)
    assert not bundles.holds(bundle(root), authority.certificate_pem)
    assert bundles.holds(bundle(root), other.certificate_pem)
    trust.uninstall(root)
    assert not bundles.holds(bundle(root), other.certificate_pem)


def test_what_others_changed_since_stays(root: Path, authority: Authority, tmp_path: Path) -> None:
    """A root that came meanwhile is kept, and ours goes, with every link to it."""
    trust.install(authority.certificate_pem, root)
    store = stores.system_store(root)
    assert store is not None
    theirs = Authority.open(tmp_path / "theirs", hostname="theirs")
    if store.tool is None:
        place = bundles.system_bundle(root)
        assert place is not None
        place.write_bytes(place.read_bytes() + theirs.certificate_pem)
    else:
        (store.anchor.parent / f"theirs{store.anchor.suffix}").write_bytes(theirs.certificate_pem)
        store.refresh()
    trust.uninstall(root)
    assert bundles.holds(bundle(root), theirs.certificate_pem)
    assert not bundles.holds(bundle(root), authority.certificate_pem)
    left = [name for name in system_tree.fingerprint(root) if stores.NAME in name or "etc/sidecar" in name]
    assert left == []
    dangling = [path for path in (root / "etc/ssl/certs").iterdir() if path.is_symlink() and not inside(root, "/" + str(path.relative_to(root))).exists()]  # fmt: skip
    assert dangling == []


def test_a_tool_that_fails_leaves_nothing(authority: Authority, tmp_path: Path) -> None:
    root = system_tree.make(tmp_path / "root", "alpine")
    (root / "usr/sbin/update-ca-certificates").write_text("#!/bin/sh\necho the disk is full >&2\nexit 3\n")
    before = system_tree.fingerprint(root)
    with pytest.raises(TrustError, match=r"failed \(3\): the disk is full"):
        trust.install(authority.certificate_pem, root)
    found = system_tree.fingerprint(root)
    assert {name: entry for name, entry in found.items() if name not in ("var", "var/lib")} == before


def test_a_tool_that_does_nothing_is_found_out(authority: Authority, tmp_path: Path) -> None:
    """Such as update-ca-trust of old releases, where it has to be enabled first."""
    root = system_tree.make(tmp_path / "root", "rhel")
    (root / "usr/bin/update-ca-trust").write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(TrustError, match="does not hold the authority afterwards") as caught:
        trust.install(authority.certificate_pem, root)
    assert "update-ca-trust enable" in str(caught.value.hint)


def test_an_install_that_was_killed_is_taken_out(
    root: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def die(*_: object) -> None:
        raise Died

    before = bundle(root)
    monkeypatch.setattr(trust, "_write_own", die)
    with pytest.raises(Died):
        trust.install(authority.certificate_pem, root)
    monkeypatch.undo()
    assert bundles.holds(bundle(root), authority.certificate_pem)
    trust.uninstall(root)
    assert bundles.certificates_in(bundle(root)) == bundles.certificates_in(before)
    assert [name for name in system_tree.fingerprint(root) if stores.NAME in name] == []
    trust.install(authority.certificate_pem, root)
    assert bundles.holds(bundle(root), authority.certificate_pem)


def test_a_system_without_roots(authority: Authority, tmp_path: Path) -> None:
    """Nothing is named that would be ours alone."""
    (tmp_path / "root").mkdir()
    report = trust.install(authority.certificate_pem, tmp_path / "root")
    assert "no roots" in report.failed[0]
    text = (tmp_path / "root/etc/sidecar/ca.env").read_text()
    assert "NODE_EXTRA_CA_CERTS" in text
    assert "SSL_CERT_FILE" not in text
    trust.uninstall(tmp_path / "root")
    assert not (tmp_path / "root/etc").exists()


def test_links_of_the_tree_do_not_leave_it(authority: Authority, tmp_path: Path) -> None:
    root = system_tree.make(tmp_path / "root", "bundle")
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "etc/sidecar").symlink_to(outside)
    shutil.rmtree(root / "usr")
    (root / "usr").symlink_to("../../../../../outside")
    trust.install(authority.certificate_pem, root)
    assert list(outside.iterdir()) == []
    assert (root / str(outside)[1:] / "ca.env").is_file()
    loop = tmp_path / "loop"
    loop.mkdir()
    (loop / "etc").symlink_to("/etc")
    with pytest.raises(TrustError, match="too many links"):
        trust.install(authority.certificate_pem, loop)


# -- Java


@pytest.fixture
def java_root(tmp_path: Path) -> Path:
    if shutil.which("keytool") is None:
        pytest.skip("there is no keytool on this machine")
    root = system_tree.make(tmp_path / "root", "bundle")
    theirs = Authority.open(tmp_path / "theirs", hostname="theirs")
    (tmp_path / "theirs.pem").write_bytes(theirs.certificate_pem)
    security = root / "usr/lib/jvm/java-17/lib/security"
    security.mkdir(parents=True)
    _keytool(security / "cacerts", "-importcert", "-noprompt", "-alias", "theirs", "-file", str(tmp_path / "theirs.pem"))  # fmt: skip
    return root


def _keytool(keystore: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["keytool", arguments[0], "-keystore", str(keystore), "-storepass", "changeit", *arguments[1:]],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_java_keystores(java_root: Path, authority: Authority, tmp_path: Path) -> None:
    keystore = java_root / "usr/lib/jvm/java-17/lib/security/cacerts"
    (java_root / "etc/pki/java").mkdir(parents=True)
    (java_root / "etc/pki/java/cacerts").symlink_to("/usr/lib/jvm/java-17/lib/security/cacerts")
    before = system_tree.fingerprint(java_root)
    report = trust.install(authority.certificate_pem, java_root)
    assert report.failed == []
    assert [text for text in report.done if text.startswith("Java")] == [f"Java keystore {keystore}"]
    listed = _keytool(keystore, "-list")
    assert certificates.fingerprint(authority.certificate) in listed
    assert "2 entries" in listed
    trust.uninstall(java_root)
    found = system_tree.fingerprint(java_root)
    assert {name: entry for name, entry in found.items() if name not in ("var", "var/lib")} == before


def test_a_keystore_that_others_changed_since(java_root: Path, authority: Authority, tmp_path: Path) -> None:
    keystore = java_root / "usr/lib/jvm/java-17/lib/security/cacerts"
    trust.install(authority.certificate_pem, java_root)
    more = Authority.open(tmp_path / "more")
    (tmp_path / "more.pem").write_bytes(more.certificate_pem)
    _keytool(keystore, "-importcert", "-noprompt", "-alias", "more", "-file", str(tmp_path / "more.pem"))
    trust.uninstall(java_root)
    listed = _keytool(keystore, "-list")
    assert certificates.fingerprint(authority.certificate) not in listed
    assert certificates.fingerprint(more.certificate) in listed
    assert "2 entries" in listed


def test_a_keystore_with_another_password_is_said(java_root: Path, authority: Authority) -> None:
    keystore = java_root / "usr/lib/jvm/java-17/lib/security/cacerts"
    subprocess.run(["keytool", "-storepasswd", "-keystore", str(keystore), "-storepass", "changeit", "-new", "hunter2hunter2"], check=True, capture_output=True)  # fmt: skip
    before = keystore.read_bytes()
    report = trust.install(authority.certificate_pem, java_root)
    assert len(report.failed) == 1
    assert str(keystore) in report.failed[0]
    assert keystore.read_bytes() == before


def test_a_keystore_of_somebody_else_is_left_to_them(java_root: Path, authority: Authority) -> None:
    keystore = java_root / "usr/lib/jvm/java-17/lib/security/cacerts"
    os.chown(keystore, 65534, -1)
    report = trust.install(authority.certificate_pem, java_root)
    assert "it is user 65534's" in report.failed[0]


def test_a_snapshot_sees_every_kind_of_change(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/same").write_text("1")
    (tmp_path / "d/mode").write_text("1")
    (tmp_path / "d/text").write_text("1")
    (tmp_path / "d/link").symlink_to("same")
    (tmp_path / "d/gone").write_text("1")
    before = snapshots.take(tmp_path, [tmp_path / "d"])
    (tmp_path / "keep").mkdir()
    snapshots.keep(tmp_path, before, tmp_path / "keep")
    (tmp_path / "d/mode").chmod(0o600)
    (tmp_path / "d/text").write_text("2")
    (tmp_path / "d/link").unlink()
    (tmp_path / "d/link").symlink_to("text")
    (tmp_path / "d/gone").unlink()
    (tmp_path / "d/new").mkdir()
    (tmp_path / "d/new/file").write_text("1")
    names = snapshots.changed(before, snapshots.take(tmp_path, [tmp_path / "d"]))
    assert names == ["d/gone", "d/link", "d/mode", "d/new", "d/new/file", "d/text"]
    snapshots.put_back(tmp_path, {name: before.get(name) for name in names}, tmp_path / "keep")
    assert snapshots.changed(before, snapshots.take(tmp_path, [tmp_path / "d"])) == []
