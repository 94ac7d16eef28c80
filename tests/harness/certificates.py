"""A CA of the tests, and certificates of it for this host: valid ones, and expired ones."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)
_LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


class Authority:
    """A CA. `certificate` is the file of its own one; files of others are put beside it."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        self.certificate = directory / f"{name}.crt"
        made = self._make(self._name, self._key, datetime.datetime.now(datetime.UTC), x509.BasicConstraints(True, None))
        self.certificate.write_bytes(made)

    def issue(
        self, name: str, hosts: Sequence[str] = (), *, is_expired: bool = False, is_nameless: bool = False
    ) -> tuple[Path, Path]:
        """Return the files of a certificate and of its key. The certificate is for 127.0.0.1 and for names of hosts, as a
        server and as a client.

        One that `is_nameless` has no common name.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC) - (10 * _DAY if is_expired else datetime.timedelta())
        files = self._directory / f"{name}.crt", self._directory / f"{name}.key"
        alternatives = x509.SubjectAlternativeName([_LOOPBACK, *map(x509.DNSName, hosts)])
        files[0].write_bytes(self._make(x509.Name([]) if is_nameless else _named(name), key, now, alternatives))
        files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        files[1].chmod(0o600)
        return files

    def _make(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime.datetime, extension: x509.ExtensionType
    ) -> bytes:
        """Return a certificate in PEM that is valid for a day before and after `now`."""
        builder = x509.CertificateBuilder(self._name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - _DAY).not_valid_after(now + _DAY)
        builder = builder.add_extension(extension, critical=True)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
