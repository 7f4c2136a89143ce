"""Content detectors: what they find, what they leave, and that no text makes them slow."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.policy.detectors import DETECTORS, detector

AZURE = "x" * 86 + "=="
FOUND = (
    ("credit_card", "card 4111 1111 1111 1111 12/27", "card # 12/27"),
    ("credit_card", "4111111111111111", "#"),
    ("credit_card", "order 17, 5500-0000-0000-0004, 3 pieces", "order 17, #, 3 pieces"),
    ("credit_card", "378282246310005 6011111111111117", "# #"),
    ("credit_card", "1234 4111111111111111", "1234 #"),
    ("us_ssn", "it is 123-45-6789.", "it is #."),
    ("email", "to a.b+c@example.co.uk, now", "to #, now"),
    ("iban", "DE89 3704 0044 0532 0130 00 THANK YOU", "# THANK YOU"),
    ("iban", "GB82WEST12345698765432", "#"),
    ("iban", "NO9386011117947", "#"),
    ("phone", "call +49 (30) 1234-5678 today", "call # today"),
    ("ip", "from 192.168.0.1 to 2001:db8::8a2e:370:7334", "from # to #"),
    ("ip", "::1", "#"),
    ("jwt", "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln x", "Bearer # x"),
    ("private_key", "a\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nb", "a\n#\nb"),
    ("private_key", "-----BEGIN OPENSSH PRIVATE KEY-----\ncut of", "#"),
    ("private_key", "-----BEGIN PGP PRIVATE KEY BLOCK-----\nx\n-----END PGP PRIVATE KEY BLOCK-----", "#"),
    ("aws_key", "id AKIAIOSFODNN7EXAMPLE", "id #"),
    ("cloud_key", "id AKIAIOSFODNN7EXAMPLE", "id #"),
    ("cloud_key", "key AIza" + "a" * 35 + "!", "key #!"),
    ("cloud_key", "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "#"),
    ("cloud_key", f"AccountName=a;AccountKey={AZURE};E=f", "AccountName=a;#;E=f"),
    ("cloud_key", "ghp_" + "A1" * 18, "#"),
)
LEFT = (
    ("credit_card", "4111111111111112"),
    ("credit_card", "0000 0000 0000 0000"),
    ("credit_card", "2024-01-02 03:04:05.678901"),
    ("credit_card", "4111"),
    ("us_ssn", "123-456-789"),
    ("iban", "DE89370400440532013001"),
    ("iban", "AB12"),
    ("ip", "999.1.1.1"),
    ("ip", "12:34:56"),
    ("ip", "std::vector"),
    ("ip", "::"),
    ("email", "a@b"),
    ("jwt", "eyJ.x"),
    ("cloud_key", "AKIA"),
)


def masked(name: str, text: str) -> str:
    return detector(name, lambda found: "#").apply(text.encode()).decode()


@pytest.mark.parametrize(("name", "text", "shown"), FOUND)
def test_what_is_found(name: str, text: str, shown: str) -> None:
    assert masked(name, text) == shown


@pytest.mark.parametrize(("name", "text"), LEFT)
def test_what_is_left(name: str, text: str) -> None:
    assert masked(name, text) == text


def test_every_detector_is_tried() -> None:
    assert {name for name, _, _ in FOUND} == set(DETECTORS)


@pytest.mark.parametrize("name", sorted(DETECTORS))
@pytest.mark.parametrize("piece", ["1 ", "11-", "DE89 ", "A1", "a@", "+1 ", "1:", "eyJa.", "1.", "aws secret ", "-----BEGIN PRIVATE KEY-----"])  # fmt: skip
def test_no_text_takes_long(name: str, piece: str) -> None:
    text = (piece * 100_000)[:100_000].encode()
    begin = time.process_time()
    detector(name, lambda found: "#").apply(text)
    assert time.process_time() - begin < 3.0


@given(st.binary(max_size=200), st.sampled_from(sorted(DETECTORS)))
def test_bytes_without_a_finding_stay_as_they_are(text: bytes, name: str) -> None:
    kept: list[str] = []
    detector(name, lambda found: kept.append(found) or found).apply(text)  # type: ignore[func-returns-value]
    shown = detector(name, lambda found: found).apply(text)
    assert shown == text
