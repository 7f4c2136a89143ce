"""The two certificates that we make: the root and its leaves (X.509 version 3, RFC 5280). Pure: time, keys and names come in."""

from __future__ import annotations

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sidecar.tls.names import Permitted, as_address

MAX_COMMON_NAME_CHARS = 64  # ub-common-name, RFC 5280 appendix A.1
_ALL_ADDRESSES = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))


def root(
    key: ec.EllipticCurvePrivateKey,
    hostname: str,
    permitted: Permitted,
    *,
    not_before: datetime.datetime,
    not_after: datetime.datetime,
) -> x509.Certificate:
    """A self-signed authority that may sign leaves and no further authority."""
    subject = x509.Name(
        [
            x509.NameAttribute(
                NameOID.COMMON_NAME, f"Sidecar local authority {hostname}"[:MAX_COMMON_NAME_CHARS]
            )
        ]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
    )
    constraints = _constraints(permitted)
    if constraints is not None:
        builder = builder.add_extension(constraints, critical=True)
    return builder.sign(key, hashes.SHA256())


def leaf(
    key: ec.EllipticCurvePrivateKey,
    names: tuple[str, ...],
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    not_before: datetime.datetime,
    not_after: datetime.datetime,
) -> x509.Certificate:
    """For a server with these `names`, which are checked."""
    # OpenSSL holds a common name against the constraints on domains where there is no other domain: an address would fail.
    common = next(
        (name for name in names if as_address(name) is None and len(name) <= MAX_COMMON_NAME_CHARS), None
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer.subject)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(not_before).not_valid_after(not_after)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(sign_certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName([_general(name) for name in names]), common is None),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False),
    ]
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(issuer_key, hashes.SHA256())


def constraints_of(certificate: x509.Certificate) -> Permitted:
    """What a root of ours is constrained to."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return Permitted()
    names = found.permitted_subtrees or []
    return Permitted(
        tuple(name.value for name in names if isinstance(name, x509.DNSName)),
        tuple(name.value for name in names if isinstance(name, x509.IPAddress)),  # type: ignore[misc]
    )


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER form, as openssl and keytool print it: `AB:CD:…`."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _general(name: str) -> x509.GeneralName:
    address = as_address(name)
    return x509.IPAddress(address) if address is not None else x509.DNSName(name)


def _constraints(permitted: Permitted) -> x509.NameConstraints | None:
    """A kind of name of which nothing is permitted has to be excluded: a constraint says nothing about other kinds."""
    if permitted.everything:
        return None
    allowed: list[x509.GeneralName] = [x509.DNSName(domain) for domain in permitted.domains]
    allowed += [x509.IPAddress(network) for network in permitted.networks]
    excluded: list[x509.GeneralName] = [] if permitted.domains else [x509.DNSName("")]
    versions = {network.version for network in permitted.networks}
    excluded += [x509.IPAddress(network) for network in _ALL_ADDRESSES if network.version not in versions]
    return x509.NameConstraints(allowed, excluded or None)


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )
