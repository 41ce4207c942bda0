"""TLS of the cloud: own certificates, client certificates, and files that are no such thing."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from isthmus.cloud.serve import Prepared, make_hub, run_cloud
from isthmus.cloud.server import SESSION_PATH, SUBPROTOCOL, CloudServer, bind
from isthmus.cloud.tls import server_context
from isthmus.protocol.errors import ConfigError

OURS = [Subprotocol(SUBPROTOCOL)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem and key.pem for localhost, ca.pem, client.pem, and other.pem of a stranger."""
    folder = tmp_path_factory.mktemp("tls")
    ca, stranger = trustme.CA(), trustme.CA()
    server = ca.issue_cert("localhost", "127.0.0.1")
    server.private_key_pem.write_to_path(folder / "key.pem")
    for blob in server.cert_chain_pems:
        blob.write_to_path(folder / "cert.pem", append=True)
    ca.cert_pem.write_to_path(folder / "ca.pem")
    ca.issue_cert("edge@example.org").private_key_and_cert_chain_pem.write_to_path(folder / "client.pem")
    stranger.issue_cert("edge@example.org").private_key_and_cert_chain_pem.write_to_path(folder / "other.pem")
    return folder


def client_context(files: Path, cert: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files / "ca.pem")
    if cert is not None:
        context.load_cert_chain(files / cert)
    return context


async def reaches(url: str, context: ssl.SSLContext) -> bool:
    try:
        async with connect(url + SESSION_PATH, subprotocols=OURS, ssl=context) as socket:
            await socket.ping()
            return True
    except (OSError, WebSocketException):
        return False


async def test_only_clients_with_a_certificate_of_ours(prepared: Prepared, files: Path) -> None:
    context = server_context(files / "cert.pem", files / "key.pem", files / "ca.pem")
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    server = CloudServer(make_hub(prepared), bind("127.0.0.1", 0), ssl_context=context)
    assert server.url.startswith("wss://127.0.0.1:")
    serving = asyncio.create_task(server.run_until_stopped())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    assert await reaches(server.url, client_context(files, "client.pem"))
    assert not await reaches(server.url, client_context(files))
    assert not await reaches(server.url, client_context(files, "other.pem"))
    old = client_context(files, "client.pem")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    assert not await reaches(server.url, old)
    server.stop()
    await serving


@pytest.mark.parametrize(
    ("cert", "key", "client_ca", "named"),
    [
        ("absent.pem", "key.pem", None, "absent.pem"),
        ("cert.pem", "absent.pem", None, "absent.pem"),
        ("cert.pem", "key.pem", "absent.pem", "absent.pem"),
        ("cert.pem", "client.pem", None, "client.pem"),  # another certificate's key
        ("junk.pem", "key.pem", None, "junk.pem"),
        ("cert.pem", "key.pem", "junk.pem", "junk.pem"),
        ("cert.pem", "locked.pem", None, "locked.pem"),
        (".", "key.pem", None, "cannot be read"),
    ],
)
def test_files_that_will_not_do_are_named(
    files: Path, cert: str, key: str, client_ca: str | None, named: str
) -> None:
    (files / "junk.pem").write_text("nothing of the kind\n")
    plain = load_pem_private_key((files / "key.pem").read_bytes(), None)
    locked = plain.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (files / "locked.pem").write_bytes(locked)
    # As the command is called: before anything slow is done.
    with pytest.raises(ConfigError) as caught:
        run_cloud(
            "anything",
            port=0,
            tls_cert=files / cert,
            tls_key=files / key,
            tls_client_ca=files / client_ca if client_ca else None,
        )
    assert caught.value.code == "bad_tls"
    assert named in caught.value.message


def test_client_certificates_need_tls(files: Path) -> None:
    with pytest.raises(ConfigError, match="need TLS") as caught:
        run_cloud("anything", port=0, tls_client_ca=files / "ca.pem")
    assert caught.value.code == "bad_tls"
