"""Certificates: self-signed at the first start, pinned by clients, shown as fingerprints. Law: files, and `openssl`.

The controller makes its own certificate with the system's `openssl`, so that no package for it is needed. Key and
certificate are two files: the key is in place before the certificate, so a crash in between leaves a key without a
certificate, and the next start makes both anew.

A client that *pins* a certificate trusts it alone, whatever host name it is asked for: the handshake ends with the
comparison of what the server has shown, byte by byte, before the first byte of a request is sent. `Trust.secure`
does both, so that nobody can do one without the other.
"""

from __future__ import annotations

import hashlib
import ssl
import stat
import subprocess
import tempfile
from pathlib import Path

import trio

from orchard.files import TLS_CERTIFICATE_FILE, TLS_KEY_FILE, write_private

HOST_NAME = "orchard-controller"  # in the certificate; existing clients ask for it by this name
DAYS = 3650  # a certificate that nobody renews must not run out
OPENSSL_SECONDS = 30.0  # a key on an elliptic curve takes none of them
MAX_COMPLAINT = 400  # characters of what openssl says
NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})  # what comes is something else

NO_OPENSSL = (
    "there is no openssl on PATH to make a certificate with; install it,"
    " or give a certificate with --controller-cert and --controller-key, or do without TLS by --insecure-no-tls"
)


class TLSError(Exception):
    """A certificate or key can't be made, used or trusted; str() says which, and what to do."""


class NotTrustedError(TLSError):
    """The server showed another certificate than the one to trust."""


def pem_to_der(pem: bytes) -> bytes:
    """Give the first certificate of a PEM text. Raises TLSError when there is none."""
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    _, found, rest = pem.partition(begin)
    body, closed, _ = rest.partition(end)
    try:
        if found and closed:
            return ssl.PEM_cert_to_DER_cert((begin + body + end).decode("ascii"))
    except ValueError:
        pass
    raise TLSError("there is no certificate in PEM")


def fingerprint(pem: bytes) -> str:
    """Give the SHA-256 fingerprint of a certificate as `openssl x509 -fingerprint` writes it. Raises TLSError."""
    return _hash(pem_to_der(pem))


# ---- the server's side ---------------------------------------------------------------------------------------------


async def self_signed(directory: Path) -> tuple[Path, Path]:
    """Give (certificate, key) of a directory, made at the first call. Raises TLSError."""
    certificate, key = directory / TLS_CERTIFICATE_FILE, directory / TLS_KEY_FILE
    if certificate.exists():
        if not key.exists():
            raise TLSError(f"{certificate} has no key: {key} is missing; bring it back, or remove the certificate, too")
        return certificate, key
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix="tls-") as draft:
            made = Path(draft) / TLS_CERTIFICATE_FILE, Path(draft) / TLS_KEY_FILE
            await _make(*made)
            await trio.to_thread.run_sync(_put_in_place, made, (certificate, key))
    except OSError as error:
        raise TLSError(f"cannot write a certificate into {directory}: {error.strerror}") from error
    return certificate, key


async def _make(certificate: Path, key: Path) -> None:
    """Have openssl make a key on the curve P-384 and a certificate for it."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1", "-nodes"]
    command += ["-sha384", "-days", str(DAYS), "-subj", f"/CN={HOST_NAME}"]
    command += ["-addext", f"subjectAltName=DNS:{HOST_NAME}", "-keyout", str(key), "-out", str(certificate)]
    complaint = b""
    try:
        with trio.move_on_after(OPENSSL_SECONDS) as patience:
            ended = await trio.run_process(
                command, stdin=b"", capture_stderr=True, stdout=subprocess.DEVNULL, check=False
            )  # fmt: skip
            complaint = ended.stderr or b""
            if ended.returncode == 0:
                return
    except FileNotFoundError:
        raise TLSError(NO_OPENSSL) from None
    except OSError as error:
        raise TLSError(f"cannot run openssl: {error.strerror}") from error
    said = complaint.decode("utf-8", "replace").strip()[-MAX_COMPLAINT:]
    if patience.cancelled_caught:
        said = f"it did not end within {OPENSSL_SECONDS:g} seconds"
    raise TLSError(f"openssl cannot make a certificate: {said}")


def _put_in_place(made: tuple[Path, Path], wanted: tuple[Path, Path]) -> None:
    """Move key and certificate where they belong, durably, the certificate last."""
    (made_certificate, made_key), (certificate, key) = made, wanted
    write_private(key, made_key.read_bytes())
    write_private(certificate, made_certificate.read_bytes())


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Make the context of a server that shows `certificate`. Raises TLSError naming the file that is wrong."""
    for path in (certificate, key):
        try:
            mode = path.stat().st_mode
            path.open("rb").close()
        except OSError as error:
            raise TLSError(f"cannot read {path}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise TLSError(f"{key} can be read by others than its owner (mode {stat.S_IMODE(mode):o}); chmod 600 it")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client of TLS 1.2 could make the server do handshakes without end.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        # An encrypted key would make OpenSSL ask on the terminal for its password.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        raise TLSError(f"{certificate} and {key} are no certificate and its key in PEM: {reason_of(error)}") from error
    return context


# ---- the client's side ---------------------------------------------------------------------------------------------


class Trust:
    """Whom a client trusts: the host's CAs, or with `pinned`, a certificate in PEM, nobody but that.

    Raises TLSError when `pinned` is no certificate.
    """

    def __init__(self, pinned: bytes | None = None) -> None:
        self._pinned = None if pinned is None else pem_to_der(pinned)
        if pinned is None:
            self._context = ssl.create_default_context()
        else:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            # Names and dates don't matter, nor who signed it: `secure` compares the whole certificate.
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.set_alpn_protocols(["http/1.1"])

    async def secure(self, stream: trio.abc.Stream, host: str) -> trio.SSLStream[trio.abc.Stream]:
        """Speak TLS over a stream, with a server that is known to be the right one when this returns.

        The stream is the caller's to close. Raises TLSError, NotTrustedError; BrokenResourceError when the connection
        breaks.
        """
        secured = trio.SSLStream(stream, self._context, server_hostname=host)
        try:
            await secured.do_handshake()
        except trio.BrokenResourceError as error:
            cause = error.__cause__
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise NotTrustedError(f"its certificate is not trusted: {cause.verify_message}") from error
            if isinstance(cause, ssl.SSLError) and cause.reason in NOT_TLS:
                raise TLSError("it does not speak TLS; is it http:// and not https://?") from error
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
                raise TLSError(f"the TLS handshake failed: {reason_of(cause)}") from error
            raise
        shown = secured.getpeercert(binary_form=True) or b""
        if self._pinned is not None and shown != self._pinned:
            raise NotTrustedError(
                f"its certificate is another one than the one to trust: {_hash(shown)}, expected {_hash(self._pinned)}"
            )
        return secured


def _hash(der: bytes) -> str:
    return hashlib.sha256(der).digest().hex(":").upper()


def reason_of(error: OSError) -> str:
    """Return the reason of an error of TLS in plain words."""
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error)
