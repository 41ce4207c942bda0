"""TLS to a cloud: own CA, names, client certificates. What is wrong is told."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from websockets.asyncio.server import serve

from isthmus.edge.link import SUBPROTOCOL, CloudLink
from isthmus.edge.tls import check_server_files, client_context
from isthmus.protocol.errors import CloudUnreachableError, ConfigError
from tests.certificates import Authority, Issued, make_authority
from tests.edge.test_edge_link import INFO, hello
from tests.edge.toy_cloud import KEY, ToyCloud

HELLO = hello()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("stranger"))


@asynccontextmanager
async def tls_cloud(shown: Issued, *, client_ca: Path | None = None) -> AsyncIterator[ToyCloud]:
    """The toy behind TLS; with `client_ca` it wants a certificate of its clients."""
    cloud = ToyCloud(INFO)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown.cert, shown.key)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    async with serve(
        cloud.handle,
        "127.0.0.1",
        0,
        ssl=context,
        subprotocols=[SUBPROTOCOL],
        process_request=cloud.check_key,
        close_timeout=0.1,
    ) as server:
        cloud.port = next(iter(server.sockets)).getsockname()[1]
        try:
            yield cloud
        finally:
            cloud.over.set()


async def connected(cloud: ToyCloud, context: ssl.SSLContext | None, host: str = "127.0.0.1") -> str:
    """The link's state after an attempt to connect. Raises what that raises."""
    link = CloudLink(f"wss://{host}:{cloud.port}", HELLO, api_key=KEY, ssl_context=context)
    try:
        await link.connect()
        return link.state
    finally:
        await link.aclose()


async def refused(cloud: ToyCloud, context: ssl.SSLContext | None, host: str = "127.0.0.1") -> str:
    """The code of the error; no message of ours reached the cloud."""
    with pytest.raises(CloudUnreachableError) as caught:
        await connected(cloud, context, host)
    assert cloud.received == []
    assert str(cloud.port) in caught.value.message
    assert caught.value.hint
    assert KEY not in str(caught.value)
    return caught.value.code


async def test_a_cloud_of_the_own_ca_is_trusted(own: Authority) -> None:
    async with tls_cloud(own.issue("127.0.0.1")) as cloud:
        assert await connected(cloud, client_context(own.ca)) == "up"


async def test_the_servers_own_certificate_may_be_named_as_ca(own: Authority) -> None:
    """Self-signed, as `openssl req -x509` makes it: here, the CA's own certificate shown by the server."""
    key = own.ca.with_name("self.key.pem")
    own._authority.private_key_pem.write_to_path(key)
    context = client_context(own.ca)
    async with tls_cloud(Issued(own.ca, key)) as cloud:
        # It holds no name at all, so the name check must still refuse it.
        assert await refused(cloud, context) == "tls_name_mismatch"
        context.check_hostname = False
        assert await connected(cloud, context) == "up"


async def test_without_its_ca_a_cloud_is_not_trusted(own: Authority, stranger: Authority) -> None:
    async with tls_cloud(own.issue("127.0.0.1")) as cloud:
        assert await refused(cloud, None) == "tls_untrusted"
        assert await refused(cloud, client_context()) == "tls_untrusted"
        assert await refused(cloud, client_context(stranger.ca)) == "tls_untrusted"


@pytest.mark.parametrize(
    ("name", "host"), [("elsewhere.example", "127.0.0.1"), ("10.0.0.1", "127.0.0.1"), ("a.b", "localhost")]
)
async def test_a_certificate_for_another_name_is_refused(own: Authority, name: str, host: str) -> None:
    async with tls_cloud(own.issue(name)) as cloud:
        assert await refused(cloud, client_context(own.ca), host) == "tls_name_mismatch"


async def test_an_expired_certificate_is_told(own: Authority) -> None:
    async with tls_cloud(own.issue("127.0.0.1", not_after=datetime(2020, 1, 1, tzinfo=UTC))) as cloud:
        assert await refused(cloud, client_context(own.ca)) == "tls_expired"


async def test_a_port_without_tls_is_told(own: Authority) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")  # as uvicorn does
        writer.close()

    cloud = ToyCloud(INFO)
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        cloud.port = server.sockets[0].getsockname()[1]
        assert await refused(cloud, client_context(own.ca)) == "tls_failed"


async def test_a_client_certificate_lets_in(own: Authority) -> None:
    client = own.issue("edge@example.org")
    async with tls_cloud(own.issue("127.0.0.1"), client_ca=own.ca) as cloud:
        assert await connected(cloud, client_context(own.ca, client.cert, client.key)) == "up"


@pytest.mark.parametrize("shown", ["none", "stranger's"])
async def test_without_a_client_certificate_of_the_ca_nobody_gets_in(
    own: Authority, stranger: Authority, shown: str
) -> None:
    other = stranger.issue("edge@example.org")
    context = client_context(own.ca) if shown == "none" else client_context(own.ca, other.cert, other.key)
    async with tls_cloud(own.issue("127.0.0.1"), client_ca=own.ca) as cloud:
        await refused(cloud, context)


# ---- files -----------------------------------------------------------------------------------------


def locked_key(own: Authority, folder: Path) -> Issued:
    """A key under a pass phrase: OpenSSL would ask for it on the terminal."""
    from cryptography.hazmat.primitives import serialization as forms

    issued = own.issue("locked")
    key = forms.load_pem_private_key(issued.key.read_bytes(), None)
    path = folder / "locked.pem"
    path.write_bytes(
        key.private_bytes(
            forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.BestAvailableEncryption(b"secret")
        )
    )
    return Issued(issued.cert, path)


Check = Callable[[Path | None, Path | None], object]


@pytest.mark.parametrize("check", [check_server_files, lambda cert, key: client_context(None, cert, key)])
def test_files_that_cannot_be_used_are_named(own: Authority, tmp_path: Path, check: Check) -> None:
    good, other, empty = own.issue("127.0.0.1"), own.issue("other"), tmp_path / "empty.pem"
    empty.write_text("")
    locked = locked_key(own, tmp_path)
    check(None, None)
    check(good.cert, good.key)
    cases: list[tuple[Path | None, Path | None, str]] = [
        (good.cert, None, "go together"),
        (None, good.key, "go together"),
        (tmp_path / "absent.pem", good.key, "absent.pem"),
        (good.cert, tmp_path / "absent.pem", "absent.pem"),
        (tmp_path, good.key, str(tmp_path)),
        (empty, good.key, "empty.pem"),
        (good.cert, empty, "empty.pem"),
        (good.cert, other.key, "other.key.pem"),
        (good.key, good.key, "key.pem"),
        (locked.cert, locked.key, "locked.pem"),
    ]
    for cert, key, named in cases:
        with pytest.raises(ConfigError, match=named) as caught:
            check(cert, key)
        assert caught.value.code == "bad_tls"
        assert caught.value.hint


@pytest.mark.parametrize("content", [None, b"", b"\x30\x82\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_ca_file_without_certificate_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"ca\.pem") as caught:
        client_context(path)
    assert caught.value.code == "bad_tls"


def test_names_are_checked_and_old_tls_is_not_spoken(own: Authority) -> None:
    for context in (client_context(), client_context(own.ca)):
        assert context.check_hostname
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert len(client_context(own.ca).get_ca_certs()) == 1, "the system's certificates are trusted too"


# ---- redirects -------------------------------------------------------------------------------------


async def test_a_redirect_is_not_followed() -> None:
    """Else whoever answers at a cloud's address could have the rows, or the key, sent elsewhere."""
    elsewhere = ToyCloud(INFO)
    async with serve(elsewhere.handle, "127.0.0.1", 0, subprotocols=[SUBPROTOCOL]) as other:
        port = next(iter(other.sockets)).getsockname()[1]

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            location = f"Location: ws://127.0.0.1:{port}/v1/session\r\n"
            writer.write(f"HTTP/1.1 307 Go\r\n{location}Content-Length: 0\r\n\r\n".encode())
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            link = CloudLink(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", HELLO, api_key=KEY)
            with pytest.raises(CloudUnreachableError, match="HTTP 307"):
                await link.connect()
            await link.aclose()
    assert elsewhere.connections == []
