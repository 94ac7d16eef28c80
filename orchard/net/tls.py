"""Certificates and TLS contexts: a self-signed certificate for the first start, fingerprints, and whom a client trusts.

The controller makes its own certificate with the system's `openssl`, so that no package for it is needed. Key and
certificate are two files. The key is in place before the certificate, so a crash in between leaves a key without a
certificate, and the next start makes both again.

A client that *pins* a certificate trusts only that one, whatever the host name is. The handshake ends with a
comparison of the whole certificate, before the first byte of a request is sent. `Trust.secure` does both, so neither
can be forgotten.

The server's end of a TLS connection is in streams.py.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import logging
import re
import socket
import ssl
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import trio

from orchard.base.files import TLS_CERTIFICATE_FILE, TLS_KEY_FILE, write_private

# A name in every certificate. Existing clients ask for it.
_HOST_NAME = "orchard-controller"
_NAME = re.compile(r"(?:\*\.)?(?=[A-Za-z0-9._-]{1,251}\Z)[A-Za-z0-9._-]*[A-Za-z][A-Za-z0-9._-]*")
# Nothing renews the certificate, so it must not expire.
_DAYS = 3650
# Creating a key on an elliptic curve takes milliseconds.
_OPENSSL_SECONDS = 30.0
# Output of openssl that is repeated in an error.
_MAX_ERROR = 400  # characters
# A certificate that expires within this time is warned of, at start and daily.
_EXPIRES_SOON = datetime.timedelta(days=30)
_WARNING_INTERVAL = 24 * 3600.0  # seconds
# Interval of checking whether the files of a certificate and its key have changed.
_LOOK_INTERVAL = 60.0  # seconds
# OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which the module ssl has no name.
_NO_CHECK_TIME = 0x200000
# The client's and the server's messages of a handshake in memory take at most this many turns.
_MAX_TURNS = 4
# OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH.
_HAS_EXPIRED, _WRONG_NAME = 10, frozenset({62, 64})
# The reasons that OpenSSL gives for bytes which are not TLS.
_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})

_NO_OPENSSL = (
    "openssl, which creates the certificate, is not on PATH; install it,"
    " or pass a certificate with --controller-cert and --controller-key, or serve without TLS with --insecure-no-tls"
)

_logger = logging.getLogger("orchard.net")


class TLSError(Exception):
    """A certificate or key cannot be created, used or trusted. The message names it and the remedy."""


class NotTrustedError(TLSError):
    """The server presented a certificate that the client does not trust."""


def pem_to_der(pem: bytes) -> bytes:
    """Return the first certificate of a PEM text in DER. Raises TLSError if there is none."""
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    _, found, rest = pem.partition(begin)
    body, closed, _ = rest.partition(end)
    try:
        if found and closed:
            return ssl.PEM_cert_to_DER_cert((begin + body + end).decode("ascii"))
    except ValueError:
        pass
    raise TLSError("no certificate in PEM format found")


def fingerprint(pem: bytes) -> str:
    """Return the SHA-256 fingerprint of a PEM certificate as `openssl x509 -fingerprint` prints it. Raises TLSError."""
    return _hash(pem_to_der(pem))


# ---- the server's side ---------------------------------------------------------------------------------------------


async def self_signed(directory: Path, names: Iterable[str] = ()) -> tuple[Path, Path]:
    """Return the certificate and the key of a directory, which the first call creates. Raises TLSError.

    The new certificate is for this host's names and addresses, and for `names`, which `check_name` has accepted.
    """
    certificate, key = directory / TLS_CERTIFICATE_FILE, directory / TLS_KEY_FILE
    if certificate.exists():
        if not key.exists():
            raise TLSError(
                f"{key} is missing, the key of {certificate}; restore the key, or remove the certificate to create both again"
            )
        return certificate, key
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix="tls-") as draft:
            made = Path(draft) / TLS_CERTIFICATE_FILE, Path(draft) / TLS_KEY_FILE
            await _make(*made, [*_host_names(), *names])
            await trio.to_thread.run_sync(_put_in_place, made, (certificate, key))
    except OSError as error:
        raise TLSError(f"cannot write a certificate into {directory}: {error.strerror}") from error
    return certificate, key


def check_name(text: str) -> str:
    """Return a host name or an IP address for a certificate. Raises ValueError if it is neither."""
    if not _NAME.fullmatch(text) and not _is_address(text):
        raise ValueError(f'the name is "{text}", expected a host name or an IP address, such as orchard.example.com')
    return text


def _host_names() -> list[str]:
    """Return the names and addresses by which this host is reached, as far as it knows them without DNS."""
    names = [_HOST_NAME, "localhost", "127.0.0.1", "::1", socket.gethostname()]
    # The addresses from which this host reaches others. Connecting a datagram socket sends nothing.
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))
            names.append(str(probe.getsockname()[0]))
    return [name for name in names if _NAME.fullmatch(name) or _is_address(name)]


def _is_address(text: str) -> bool:
    try:
        # A zone means something on this host only.
        return not getattr(ipaddress.ip_address(text), "scope_id", None)
    except ValueError:
        return False


async def _make(certificate: Path, key: Path, names: Iterable[str]) -> None:
    """Create a key on the curve P-256 and a certificate for it and for `names` with openssl.

    A handshake with a key on P-384 costs the server seven times what it costs a client.
    """
    alternatives = ",".join(dict.fromkeys(f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names))
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-sha256", "-days", str(_DAYS), "-subj", f"/CN={_HOST_NAME}"]
    command += ["-addext", f"subjectAltName={alternatives}", "-keyout", str(key), "-out", str(certificate)]
    error_output = b""
    try:
        with trio.move_on_after(_OPENSSL_SECONDS) as patience:
            ended = await trio.run_process(
                command, stdin=b"", capture_stderr=True, stdout=subprocess.DEVNULL, check=False
            )  # fmt: skip
            error_output = ended.stderr or b""
            if ended.returncode == 0:
                return
    except FileNotFoundError:
        raise TLSError(_NO_OPENSSL) from None
    except OSError as error:
        raise TLSError(f"cannot run openssl: {error.strerror}") from error
    said = error_output.decode("utf-8", "replace").strip()[-_MAX_ERROR:]
    if patience.cancelled_caught:
        said = f"not finished within {_OPENSSL_SECONDS:g} seconds"
    raise TLSError(f"openssl cannot create a certificate: {said}")


def _put_in_place(made: tuple[Path, Path], wanted: tuple[Path, Path]) -> None:
    """Move the key and then the certificate to their places, each durably."""
    (made_certificate, made_key), (certificate, key) = made, wanted
    write_private(key, made_key.read_bytes())
    write_private(certificate, made_certificate.read_bytes())


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the TLS context of a server with a certificate and its key. Raises TLSError, which names the file."""
    for path in (certificate, key):
        try:
            mode = path.stat().st_mode
            path.open("rb").close()
        except OSError as error:
            raise TLSError(f"cannot read {path}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise TLSError(
            f"{key} has mode {stat.S_IMODE(mode):o}, so others can read it, expected 600; run: chmod 600 {key}"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client of TLS 1.2 could make the server do handshakes without end.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without `password` OpenSSL would ask on the terminal for the password of an encrypted key.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        raise TLSError(
            f"{certificate} and {key} are not a certificate and its key in PEM format: {reason_of(error)}"
        ) from error
    return context


def inspecting_context(der: bytes) -> ssl.SSLContext:
    """Return the context of a client that trusts one certificate, whatever its dates and names are. Raises SSLError.

    The module ssl parses a certificate only for a client that has verified it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    context.load_verify_locations(cadata=der)
    return context


def expiry_and_names(shown: Mapping[str, Any]) -> tuple[datetime.datetime, frozenset[str]]:
    """Return when a certificate expires, and its names and addresses, from what SSLSocket.getpeercert returns."""
    expires = datetime.datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), datetime.UTC)
    return expires, frozenset(normal_host(value) for _, value in shown.get("subjectAltName", ()))


def inspect_pair(context: ssl.SSLContext, der: bytes) -> tuple[datetime.datetime, frozenset[str]]:
    """Return when the certificate of a server's context expires, and its names and addresses. Raises TLSError.

    A client in memory shakes hands with the server's context.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        trusting = inspecting_context(der)
        server = context.wrap_bio(to_server, to_client, server_side=True)
        client = trusting.wrap_bio(to_client, to_server)
        for _ in range(_MAX_TURNS):
            for end in (client, server):
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        # Raises ValueError if the handshake has not ended.
        shown: Any = client.getpeercert()
        return expiry_and_names(shown)
    except (ssl.SSLError, ValueError) as error:
        raise TLSError(f"a client cannot use it: {error}") from error


def covers(names: AbstractSet[str], name: str) -> bool:
    """Return whether a certificate with these names is for a host name or an address."""
    plain = normal_host(name)
    return bool({plain, f"*.{plain.partition('.')[2]}"} & names)


def normal_host(name: str) -> str:
    """Return the one spelling of a host name or an address."""
    return str(ipaddress.ip_address(name.strip())) if _is_address(name.strip()) else name.lower()


class ServerPair:
    """A server's certificate and its key, in files that may be exchanged while it serves.

    It logs warnings of a certificate that expires soon or lacks one of `names`; `remedy` says in them how to make
    another one. `context` is for new connections. Raises TLSError if the files cannot be used.
    """

    def __init__(
        self, files: tuple[Path, Path], names: Sequence[str], remedy: str, clock: Callable[[], datetime.datetime]
    ) -> None:
        self._files = files
        self._names = names
        self._remedy = remedy
        self._clock = clock
        self._identity = self._identify()
        self._load()

    def _load(self) -> None:
        context, pem = server_context(*self._files), self._files[0].read_bytes()
        self.fingerprint = fingerprint(pem)
        self.context, self.pem = context, pem
        # When the certificate expires; None if that cannot be read.
        self.expires: datetime.datetime | None = None
        self.warn()

    def warn(self) -> None:
        """Note when the certificate expires, and log what is wrong with it."""
        path = self._files[0]
        try:
            expires, names = inspect_pair(self.context, pem_to_der(self.pem))
        except TLSError as error:
            _logger.warning("cannot examine the certificate %s: %s", path, error)
            return
        self.expires = expires
        left = expires - self._clock()
        if left <= _EXPIRES_SOON:
            verb = "expires" if left > datetime.timedelta() else "expired"
            _logger.warning(
                "the certificate %s %s on %s; %s", path, verb, f"{expires:%Y-%m-%d %H:%M} UTC", self._remedy
            )
        for name in self._names:
            if not covers(names, name):
                _logger.warning("the certificate %s is not for the name %s; %s", path, name, self._remedy)

    def _identify(self) -> list[tuple[int, int, int] | None]:
        """Return what changes when one of the files is replaced or written."""
        found: list[tuple[int, int, int] | None] = []
        for path in self._files:
            try:
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except OSError:
                found.append(None)
        return found

    def reload(self) -> bool:
        """Load the files again if they have changed. Return whether `context` is a new one.

        A pair that cannot be used is logged, and the one before stays. It may be half of an exchange.
        """
        # Before the files are read: a change meanwhile is seen at the next look.
        if (identity := self._identify()) == self._identity:
            return False
        self._identity = identity
        try:
            self._load()
        except (TLSError, OSError) as error:
            _logger.warning("the certificate stays as it was until its files change again: %s", error)
            return False
        _logger.info("loaded the certificate %s again, fingerprint %s", self._files[0], self.fingerprint)
        return True

    async def watch(self, use: Callable[[ssl.SSLContext], None]) -> None:
        """Pass the context to `use` whenever the files have changed, and repeat the warnings daily. Does not return."""
        warned = trio.current_time()
        while True:
            await trio.sleep(_LOOK_INTERVAL)
            if self.reload():
                use(self.context)
                warned = trio.current_time()
            elif trio.current_time() - warned >= _WARNING_INTERVAL:
                self.warn()
                warned = trio.current_time()


# ---- the client's side ---------------------------------------------------------------------------------------------


class Trust:
    """Which servers a client trusts: those that CAs certify, or only the one with the `pinned` certificate, in PEM.

    The CAs are those in the file `ca`, or the host's. `certificate` and `key` are the files of the client's own pair,
    for a server that asks for it. All files are in PEM. Raises TLSError if one of them cannot be used.
    """

    def __init__(
        self,
        pinned: bytes | None = None,
        ca: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        self._pinned = None if pinned is None else pem_to_der(pinned)
        if pinned is None:
            self._context = _client_context(ca, certificate, key)
        else:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            # Names, dates and the issuer do not matter, because `secure` compares the whole certificate.
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.set_alpn_protocols(["http/1.1"])

    async def secure(self, stream: trio.abc.Stream, host: str) -> trio.SSLStream[trio.abc.Stream]:
        """Shake hands over a stream. When this returns, the server is one that is trusted.

        The caller closes `stream`. Raises TLSError, NotTrustedError; BrokenResourceError if the connection breaks.
        """
        secured = trio.SSLStream(stream, self._context, server_hostname=host)
        try:
            await secured.do_handshake()
        except trio.BrokenResourceError as error:
            cause = error.__cause__
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise NotTrustedError(f"its certificate is not trusted: {cause.verify_message}") from error
            if isinstance(cause, ssl.SSLError) and cause.reason in _NOT_TLS:
                raise TLSError("the server does not speak TLS; is its URL http:// instead of https://?") from error
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
                raise TLSError(f"the TLS handshake failed: {reason_of(cause)}") from error
            raise
        shown = secured.getpeercert(binary_form=True) or b""
        if self._pinned is not None and shown != self._pinned:
            raise NotTrustedError(
                f"the fingerprint of its certificate is {_hash(shown)}, expected {_hash(self._pinned)}"
            )
        return secured


def _client_context(ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise TLSError(f"{ca} has no certificates of CAs in PEM format: {reason_of(error)}") from error
    if certificate is not None:
        try:
            # Without `password` OpenSSL would ask on the terminal for the password of an encrypted key.
            context.load_cert_chain(certificate, key, password=lambda: "")
        except OSError as error:
            raise TLSError(
                f"{certificate} and {key} are not a certificate and its key in PEM format: {reason_of(error)}"
            ) from error
    return context


CertificateProblem = Literal["", "unknown issuer", "expired", "wrong name", "client"]


def certificate_problem(error: BaseException) -> CertificateProblem:
    """Return what is wrong with a certificate if a connection failed for that: with the server's, or with the "client"'s own.

    `error` is that of the connection, with its causes. With TLS 1.3 the server refuses a client after the handshake.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        if cause.verify_code == _HAS_EXPIRED:
            return "expired"
        return "wrong name" if cause.verify_code in _WRONG_NAME else "unknown issuer"
    reason = "" if cause is None else str(cause.reason)
    # OpenSSL refuses a client of TLS 1.2 without a certificate by HANDSHAKE_FAILURE.
    is_about_client = any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE"))
    return "client" if "ALERT" in reason and is_about_client else ""


def _hash(der: bytes) -> str:
    return hashlib.sha256(der).digest().hex(":").upper()


def reason_of(error: OSError) -> str:
    """Return the reason of an error of TLS in plain words."""
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error)
