"""Certificates are created, presented and pinned; errors name the file and the remedy."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import stat
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from harness.certificates import Authority
from harness.programs import need

from orchard.net import tls
from orchard.net.tls import NotTrustedError, TLSError, Trust


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Two certificates with their keys."""
    need("openssl")
    directories = [tmp_path_factory.mktemp("tls") for _ in range(2)]
    return [trio.run(tls.self_signed, directory) for directory in directories]


Pairs = list[tuple[Path, Path]]


@asynccontextmanager
async def connected(certificate: Path, key: Path, trust: Trust, host: str = "127.0.0.1") -> AsyncIterator[bytes]:
    """Shake hands over a memory stream, and yield what the server sends then."""
    ours, theirs = trio.testing.memory_stream_pair()
    server = trio.SSLStream(theirs, tls.server_context(certificate, key), server_side=True)

    async def serve() -> None:
        try:
            await server.do_handshake()
            await server.send_all(b"hello")
        except trio.BrokenResourceError:
            await theirs.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        try:
            secured = await trust.secure(ours, host)
            yield bytes(await secured.receive_some(5))
        finally:
            await ours.aclose()


def openssl(*words: object) -> str:
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=True).stdout


def test_certificate_has_curve_name_lifetime_and_private_key(pairs: Pairs) -> None:
    certificate, key = pairs[0]
    text = openssl("x509", "-in", certificate, "-noout", "-text")
    for words in (
        *("P-256", "CN = orchard-controller", "DNS:orchard-controller", "DNS:localhost", "IP Address:127.0.0.1"),
        f"DNS:{socket.gethostname()}",
    ):
        assert words in text
    openssl("x509", "-in", certificate, "-noout", "-checkend", 3640 * 24 * 3600)
    shown = openssl("x509", "-in", certificate, "-noout", "-fingerprint", "-sha256")
    assert shown.strip().partition("=")[2] == tls.fingerprint(certificate.read_bytes())
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.needs("openssl")
async def test_certificate_is_for_more_names_on_request(tmp_path: Path) -> None:
    certificate, _ = await tls.self_signed(tmp_path, ["orchard.example.com", "192.0.2.7"])
    text = await trio.to_thread.run_sync(openssl, "x509", "-in", certificate, "-noout", "-text")
    assert "DNS:orchard.example.com" in text
    assert "IP Address:192.0.2.7" in text


@pytest.mark.parametrize("name", ["", "a,DNS:b", "a b", "https://a", "fe80::1%en0", "1.2.3.4.5", "a\n"])
def test_invalid_names_for_a_certificate_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="host name or an IP address"):
        tls.check_name(name)


async def test_self_signed_certificate_is_created_once(pairs: Pairs) -> None:
    certificate, key = pairs[0]
    before = certificate.read_bytes(), key.read_bytes()
    assert await tls.self_signed(certificate.parent) == (certificate, key)
    assert (certificate.read_bytes(), key.read_bytes()) == before
    assert {path.name for path in certificate.parent.iterdir()} == {"controller.crt", "controller.key"}


@pytest.mark.needs("openssl")
async def test_key_without_certificate_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "controller.key").write_text("half")
    certificate, key = await tls.self_signed(tmp_path)
    tls.server_context(certificate, key)


async def test_certificate_without_its_key_is_an_error(tmp_path: Path, pairs: Pairs) -> None:
    (tmp_path / "controller.crt").write_bytes(pairs[0][0].read_bytes())
    with pytest.raises(TLSError, match=r"controller\.key is missing"):
        await tls.self_signed(tmp_path)
    assert not (tmp_path / "controller.key").exists()


async def test_missing_openssl_names_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TLSError, match=r"install it.*--controller-cert and --controller-key.*--insecure-no-tls"):
        await tls.self_signed(tmp_path)


async def test_error_of_openssl_is_in_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "openssl"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no entropy today >&2\nexit 1\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(program.parent))
    with pytest.raises(TLSError, match="no entropy today"):
        await tls.self_signed(tmp_path)
    assert os.listdir(tmp_path) == ["bin"]  # noqa: PTH208 -- not for an asynchronous function


def test_key_that_others_can_read_is_refused(tmp_path: Path, pairs: Pairs) -> None:
    certificate, key = pairs[0]
    open_key = tmp_path / "open.key"
    open_key.write_bytes(key.read_bytes())
    for mode in (0o640, 0o604):
        open_key.chmod(mode)
        with pytest.raises(TLSError, match=rf"open\.key has mode {mode:o}.*chmod 600"):
            tls.server_context(certificate, open_key)


def test_certificate_and_key_that_do_not_match_are_named(tmp_path: Path, pairs: Pairs) -> None:
    (mine, _), (_, other) = pairs
    with pytest.raises(TLSError, match=r"controller\.crt and .*controller\.key are not a certificate and its key"):
        tls.server_context(mine, other)
    with pytest.raises(TLSError, match=r"cannot read .*none\.crt: No such file"):
        tls.server_context(tmp_path / "none.crt", other)


async def test_pinned_certificate_is_trusted_for_any_host_name(pairs: Pairs) -> None:
    certificate, key = pairs[0]
    trust = Trust(certificate.read_bytes())
    for host in ("127.0.0.1", "orchard-controller", "elsewhere.example.com"):
        async with connected(certificate, key, trust, host) as said:
            assert said == b"hello"


async def test_other_certificate_than_the_pinned_one_is_refused(pairs: Pairs) -> None:
    (mine, key), (other, _) = pairs
    pinned = other.read_bytes()
    with pytest.RaisesGroup(
        pytest.RaisesExc(NotTrustedError, match=tls.fingerprint(mine.read_bytes()) + ".*expected .*"),
        flatten_subgroups=True,
    ):
        async with connected(mine, key, Trust(pinned)):
            raise AssertionError("it was trusted")


async def test_self_signed_certificate_is_refused_without_pinning(pairs: Pairs) -> None:
    certificate, key = pairs[0]
    with pytest.RaisesGroup(
        pytest.RaisesExc(NotTrustedError, match="certificate is not trusted: self-signed"), flatten_subgroups=True
    ):
        async with connected(certificate, key, Trust()):
            raise AssertionError("it was trusted")


async def test_server_without_tls_is_reported(nursery: trio.Nursery) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    nursery.start_soon(theirs.send_all, b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(TLSError, match="http://"):
        await Trust().secure(ours, "h")


@pytest.mark.parametrize(
    "pem",
    [b"", b"x", b"-----BEGIN CERTIFICATE-----\n-", b"-----BEGIN CERTIFICATE-----\n\xff\n-----END CERTIFICATE-----"],
)
def test_text_without_a_certificate_cannot_be_pinned(pem: bytes) -> None:
    with pytest.raises(TLSError, match="PEM"):
        Trust(pem)


def test_minimum_tls_version_is_1_2(pairs: Pairs) -> None:
    assert tls.server_context(*pairs[0]).minimum_version == ssl.TLSVersion.TLSv1_2


def make_pair(directory: Path, *options: str, name: str = "pair") -> tuple[Path, Path]:
    """Create a certificate for `a.example.com` and ::1 and its key, as files of one name."""
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    words = (
        "req -x509 -newkey ec -nodes -subj /CN=a -addext subjectAltName=DNS:a.example.com,DNS:*.b.example.com,IP:::1"
    )
    openssl(*words.split(), *(options or ("-pkeyopt", "ec_paramgen_curve:P-256")), "-keyout", key, "-out", certificate)
    return certificate, key


CURVES = [("-pkeyopt", f"ec_paramgen_curve:{curve}", "-days", "10") for curve in ("P-256", "P-384")]


def after(days: float) -> Callable[[], datetime.datetime]:
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days)
    return lambda: moment


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("options", CURVES)
@pytest.mark.parametrize(("now", "warned"), [(-21, False), (-19, True), (0, True), (11, True)])
def test_certificate_that_expires_within_30_days_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: tuple[str, ...], now: float, warned: bool
) -> None:
    tls.ServerPair(make_pair(tmp_path, *options), [], "REMEDY", after(now))
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(10)
    assert len(warnings_of(caplog)) == warned
    for message in warnings_of(caplog):
        assert f"{end:%Y-%m-%d}" in message
        assert "REMEDY" in message


@pytest.mark.needs("openssl")
def test_certificate_that_has_expired_is_warned_of_with_its_date(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = make_pair(tmp_path)
    request = tmp_path / "request"
    openssl("req", "-new", "-key", key, "-subj", "/CN=a", "-out", request)
    openssl("x509", "-req", "-in", request, "-signkey", key, "-days", -1, "-out", certificate)
    tls.ServerPair((certificate, key), [], "REMEDY", after(0))
    (message,) = warnings_of(caplog)
    assert f"{datetime.datetime.now(datetime.UTC) - datetime.timedelta(1):%Y-%m-%d}" in message
    assert "REMEDY" in message


@pytest.mark.needs("openssl")
def test_names_that_a_kept_certificate_lacks_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    present, lacking = ["A.example.com", "x.b.example.com", "0:0::1"], ["b.example.com", "192.0.2.1"]
    tls.ServerPair(make_pair(tmp_path), [*present, *lacking], "REMEDY", after(-60))
    messages = warnings_of(caplog)
    assert len(messages) == len(lacking)
    for name, message in zip(lacking, messages, strict=True):
        assert name in message
        assert "REMEDY" in message


@pytest.mark.needs("openssl")
async def test_warnings_are_repeated_daily(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    pair = tls.ServerPair(make_pair(tmp_path), [], "REMEDY", after(0))
    with trio.move_on_after(2.5 * 24 * 3600):
        await pair.watch(lambda _: None)
    assert len(warnings_of(caplog)) == 3


@pytest.mark.needs("openssl")
async def test_changed_files_are_used_and_halves_of_an_exchange_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    files, new = make_pair(tmp_path), make_pair(tmp_path, name="new")
    pair = tls.ServerPair(files, [], "", after(-60))
    old_context, used = pair.context, list[ssl.SSLContext]()
    nursery.start_soon(pair.watch, used.append)
    # The key first, as half of an exchange.
    new[1].replace(files[1])
    await trio.sleep(300)
    assert used == []
    assert pair.context is old_context
    assert len(warnings_of(caplog)) == 1
    tls.inspect_pair(old_context, tls.pem_to_der(pair.pem))
    files[0].unlink()
    await trio.sleep(300)
    assert len(warnings_of(caplog)) == 2
    new[0].replace(files[0])
    await trio.sleep(61)
    assert used == [pair.context]
    assert pair.context is not old_context
    assert pair.fingerprint == tls.fingerprint(files[0].read_bytes())
    assert len(warnings_of(caplog)) == 2
    await trio.sleep(300)
    assert len(used) == 1
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("shown", ["none", "foreign", "expired", "right"])
async def test_refusal_of_the_clients_certificate_is_recognised(
    version: ssl.TLSVersion, shown: str, tmp_path: Path
) -> None:
    """With TLS 1.3 the refusal comes after the handshake, instead of an answer."""
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    context = tls.server_context(*authority.issue("server"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority.certificate)
    context.maximum_version = version
    issuer = other if shown == "foreign" else authority
    pair = () if shown == "none" else issuer.issue("client", is_expired=shown == "expired")
    ours, theirs = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    def serve() -> None:
        # trio would not send the alert.
        with suppress(ssl.SSLError), theirs, context.wrap_socket(theirs, server_side=True) as server:
            server.sendall(b"hello")

    async def greet() -> bytes:
        secured = await Trust(None, authority.certificate, *pair).secure(stream, "127.0.0.1")
        return bytes(await secured.receive_some(5))

    async with trio.open_nursery() as nursery, stream:
        nursery.start_soon(trio.to_thread.run_sync, serve)
        if shown == "right":
            assert await greet() == b"hello"
        else:
            with pytest.raises((TLSError, trio.BrokenResourceError)) as error:
                await greet()
            assert tls.certificate_problem(error.value) == "client"
