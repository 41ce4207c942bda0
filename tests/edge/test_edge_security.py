"""Who may use the edge's API: keys, TLS, addresses."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from isthmus.edge.api import ServedModel, make_app
from isthmus.edge.guard import OPEN_PATHS
from isthmus.edge.server import check_edge
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.keys import add_key, make_key
from tests.certificates import Issued, make_authority
from tests.edge.edge_world import TinyModel
from tests.edge.live_edge import LiveEdge, live_edge

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
ALICE, BOB = make_key(), "bobs-own-plain-key"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """alice's key hashed, bob's not."""
    path = tmp_path / "keys"
    path.write_text(f"bob:{BOB}\n")
    path.chmod(0o600)
    add_key(path, "alice", ALICE)
    return path


@pytest.fixture
def edge(tiny: TinyModel, key_file: Path) -> Iterator[LiveEdge]:
    with live_edge(tiny.pack, served={"key_file": key_file}) as edge:
        yield edge


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Checks the error's form, which is OpenAI's; returns it."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error


# ---- keys --------------------------------------------------------------------------------------------


def test_a_key_lets_in_whether_hashed_or_not(edge: LiveEdge) -> None:
    for key in (ALICE, BOB):
        assert edge.http.post(CHAT, json=BODY, headers=bearer(key)).status_code == 200
        assert edge.http.get("/v1/models", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": ALICE},
        {"authorization": f"Basic {ALICE}"},
        {"authorization": f"Bearer {ALICE}x"},
        {"authorization": f"Bearer {ALICE[:-1]}"},
        {"authorization": "Bearer " + "x" * 10_000},
        {"x-api-key": ALICE},
    ],
)
def test_without_a_key_nothing_is_done(edge: LiveEdge, headers: dict[str, str]) -> None:
    answer = edge.http.post(CHAT, json=BODY, headers=headers)
    error = refused(answer, 401, "invalid_api_key")
    assert error["type"] == "invalid_request_error"
    assert "--serve-key-file" in error["message"]
    assert answer.headers["www-authenticate"] == "Bearer"
    assert edge.http.get("/v1/stats", headers=bearer(ALICE)).json()["requests"] == 0


def test_the_stored_hash_is_no_key(edge: LiveEdge, key_file: Path) -> None:
    entry = next(line for line in key_file.read_text().splitlines() if line.startswith("alice"))
    for part in (entry, entry.partition(":")[2], entry.rpartition(":")[2]):
        refused(edge.http.get("/v1/models", headers=bearer(part)), 401, "invalid_api_key")


def test_every_path_but_the_probes_and_the_page_asks_for_a_key(edge: LiveEdge, tiny: TinyModel) -> None:
    model = ServedModel("m", None, None, {})  # type: ignore[arg-type]  # only its routes are looked at
    paths = {route.path for route in make_app(model).routes}  # type: ignore[attr-defined]
    assert paths >= OPEN_PATHS | {CHAT, "/v1/stats"}
    for path in (paths - OPEN_PATHS) | {
        *("/metrics", "/livez/", "//livez", "/v1", "/livez/../v1/models", "/ui", "/ui/../v1/models"),
    }:
        for method in ("GET", "POST", "OPTIONS"):
            refused(edge.http.request(method, f"{edge.url}{path}"), 401, "invalid_api_key")
    for path in OPEN_PATHS:
        assert edge.http.get(path).status_code == 200


def test_a_large_body_of_a_stranger_is_not_read(edge: LiveEdge) -> None:
    url = httpx.URL(edge.url)
    with socket.create_connection((url.host, url.port or 80), timeout=30) as link:
        link.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000000\r\n\r\n".encode())
        answer = b""
        while part := link.recv(65536):  # until it closes: nothing of the body was sent
            answer += part
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_keys_are_read_again_while_it_runs(edge: LiveEdge, key_file: Path) -> None:
    carol = make_key()
    refused(edge.http.get("/v1/models", headers=bearer(carol)), 401, "invalid_api_key")
    add_key(key_file, "carol", carol)
    assert edge.http.get("/v1/models", headers=bearer(carol)).status_code == 200
    kept = [line for line in key_file.read_text().splitlines() if not line.startswith("bob")]
    key_file.write_text("\n".join(kept))
    refused(edge.http.get("/v1/models", headers=bearer(BOB)), 401, "invalid_api_key")
    assert edge.http.get("/v1/models", headers=bearer(ALICE)).status_code == 200


@pytest.mark.parametrize("how", ["broken", "empty", "gone"])
def test_a_key_file_that_breaks_lets_nobody_in_and_nobody_out(
    edge: LiveEdge, key_file: Path, how: str
) -> None:
    if how == "gone":
        key_file.unlink()
    else:
        key_file.write_text("no colon here" if how == "broken" else "")
    assert edge.http.get("/v1/models", headers=bearer(ALICE)).status_code == 200
    refused(edge.http.get("/v1/models", headers=bearer("no colon here")), 401, "invalid_api_key")
    refused(edge.http.get("/v1/models"), 401, "invalid_api_key")


def test_a_key_opens_nothing_to_other_pages_and_names(edge: LiveEdge) -> None:
    evil = {"origin": "https://evil.example"}
    refused(edge.http.post(CHAT, json=BODY, headers=bearer(ALICE) | evil), 403, "foreign_origin")
    host = {"host": "evil.example"}
    refused(edge.http.get("/v1/models", headers=bearer(ALICE) | host), 403, "foreign_host")
    refused(edge.http.get("/livez", headers=host), 403, "foreign_host")


# ---- TLS ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Issued, ssl.SSLContext]:
    """The server's files; whom a client trusts."""
    own = make_authority(tmp_path_factory.mktemp("tls"))
    return own.issue("127.0.0.1", "localhost"), ssl.create_default_context(cafile=own.ca)


def test_tls_is_served(tiny: TinyModel, key_file: Path, certificates: tuple[Issued, ssl.SSLContext]) -> None:
    files, trusting = certificates
    served = {"key_file": key_file, "tls_cert": files.cert, "tls_key": files.key}
    with live_edge(tiny.pack, served=served, verify=trusting) as edge:
        assert edge.url.startswith("https://127.0.0.1:")
        assert edge.http.post(CHAT, json=BODY, headers=bearer(ALICE)).status_code == 200
        own_page = bearer(ALICE) | {"origin": edge.url}
        assert edge.http.get("/v1/models", headers=own_page).status_code == 200
        refused(edge.http.get("/v1/models"), 401, "invalid_api_key")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{edge.url}/livez")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{edge.url.replace('https', 'http')}/livez")


def test_beyond_loopback_any_host_name_may_be_used(
    tiny: TinyModel, key_file: Path, certificates: tuple[Issued, ssl.SSLContext]
) -> None:
    """Its own names are not known there; the key and the certificate's name do what the Host check does."""
    files, trusting = certificates
    served = {"host": "0.0.0.0", "key_file": key_file, "tls_cert": files.cert, "tls_key": files.key}
    with live_edge(tiny.pack, served=served, verify=trusting) as edge:
        url = edge.url.replace("0.0.0.0", "127.0.0.1")
        named = bearer(ALICE) | {"host": "edge.example:1"}
        assert edge.http.get(f"{url}/v1/models", headers=named).status_code == 200
        page = named | {"origin": "https://edge.example:1"}
        assert edge.http.get(f"{url}/v1/models", headers=page).status_code == 200
        page = named | {"origin": "https://evil.example:1"}
        refused(edge.http.get(f"{url}/v1/models", headers=page), 403, "foreign_origin")
        refused(edge.http.get(f"{url}/v1/models", headers={"host": "edge.example"}), 401, "invalid_api_key")


# ---- what may be served ------------------------------------------------------------------------------


def test_beyond_loopback_both_are_needed(key_file: Path, certificates: tuple[Issued, ssl.SSLContext]) -> None:
    files, _ = certificates
    keys: dict[str, Any] = {"key_file": key_file}
    tls: dict[str, Any] = {"tls_cert": files.cert, "tls_key": files.key}
    nothing: dict[str, Any] = {"key_file": None, "tls_cert": None, "tls_key": None}
    plain_bob = 1  # remark about the unhashed key
    assert check_edge("0.0.0.0", **(nothing | keys | tls), insecure=False)[plain_bob:] == []
    assert check_edge("127.0.0.1", **nothing, insecure=False) == []
    for given, missing in (
        (nothing, {"--serve-key-file", "--tls-cert/--tls-key"}),
        (nothing | keys, {"--tls-cert/--tls-key"}),
        (nothing | tls, {"--serve-key-file"}),
    ):
        with pytest.raises(ConfigError, match=r"0\.0\.0\.0") as caught:
            check_edge("0.0.0.0", **given, insecure=False)
        assert caught.value.code == "insecure_bind"
        warning = check_edge("0.0.0.0", **given, insecure=True)[0]
        for option in ("--serve-key-file", "--tls-cert/--tls-key"):
            assert (option in caught.value.message) is (option in missing)
            assert (option in warning) is (option in missing)


def test_unusable_files_are_refused_before_anything_is_loaded(tmp_path: Path, key_file: Path) -> None:
    absent = tmp_path / "absent"
    for files, named in (
        ({"key_file": absent, "tls_cert": None, "tls_key": None}, "absent"),
        ({"key_file": None, "tls_cert": absent, "tls_key": absent}, "absent"),
        ({"key_file": None, "tls_cert": absent, "tls_key": None}, "go together"),
    ):
        with pytest.raises(ConfigError, match=named):
            check_edge("127.0.0.1", **files, insecure=False)
