"""Keys and TLS with real processes: who gets in at the edge and at the cloud, and what is said where not."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.certificates import Authority, make_authority
from tests.processes import Service, run, serve

pytestmark = pytest.mark.processes

PROMPT = "hello the"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def built(model: str, env: dict[str, str]) -> list[str]:
    """Arguments that choose the tiny model, whose pack is built."""
    assert run("build", model, "--bits", "8", env=env).returncode == 0
    return ["--model", model, "--bits", "8"]


def make_key(path: Path, label: str, env: dict[str, str]) -> str:
    """A new key, its hash in the key file at `path`."""
    done = run("key", label, "--file", str(path), "--json", env=env)
    assert done.returncode == 0, done.stderr
    key: str = json.loads(done.stdout)["key"]
    return key


def failed(done: subprocess.CompletedProcess[str], status: int, code: str) -> dict[str, str]:
    """Checks that a command failed as CONTRACT says; its error."""
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    error: dict[str, str] = json.loads(done.stdout)["error"]
    assert error["code"] == code
    assert error["hint"]
    return error


# ---- keys ------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_stored_hashed(env: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = make_key(path, "alice", env)
    assert len(key) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert key not in path.read_text()
    done = run("key", "bob", "--file", str(path), env=env)
    assert done.stdout.strip() != key
    assert len(done.stdout.strip()) == 64
    assert "not shown again" in done.stderr
    assert done.stdout.strip() not in path.read_text()
    failed(run("key", "alice", "--file", str(path), "--json", env=env), 2, "label_taken")


def test_a_key_without_a_file_comes_with_its_line(env: dict[str, str]) -> None:
    made = json.loads(run("key", "alice", "--json", env=env).stdout)
    assert made["file"] is None
    assert made["line"].startswith("alice:sha256:")
    assert made["key"] not in made["line"]


# ---- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "key_option"), [("edge", "--serve-key-file"), ("cloud", "--api-key-file")])
def test_other_machines_are_not_let_in_unasked(
    kind: str, key_option: str, model: str, env: dict[str, str]
) -> None:
    command = ["serve", kind, "--model", model, "--host", "0.0.0.0", "--port", "0", "--json"]
    error = failed(run(*command, env=env), 2, "insecure_bind")
    assert key_option in error["message"]
    assert "--tls-cert" in error["message"]
    assert "--insecure" in error["hint"]


def test_a_draining_cloud_sends_nobody_to_a_url_that_is_none(model: str, env: dict[str, str]) -> None:
    wrong = {**env, "ISTHMUS_ALTERNATIVE": "https://alice:secret@other.example"}
    error = failed(run("serve", "cloud", "--model", model, "--json", env=wrong), 2, "bad_alternative")
    assert "secret" not in error["message"]


@contextmanager
def heard(*arguments: str, env: dict[str, str], log: Path) -> Iterator[Service]:
    """`isthmus serve ARGUMENTS`, its log in a file."""
    command = [sys.executable, "-m", "isthmus", "serve", *arguments, "--json"]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
    assert process.stdout is not None
    with process.stdout:
        try:
            line = process.stdout.readline()
            assert '"url"' in line, log.read_text() + line
            yield Service(process, json.loads(line)["url"])
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.parametrize("kind", ["edge", "cloud"])
def test_insecure_says_so_at_the_start(
    kind: str, model: str, built: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    chosen = built if kind == "edge" else ["--model", model, "--precision", "fp32"]
    log = tmp_path / "log"
    with heard(kind, *chosen, "--host", "0.0.0.0", "--port", "0", "--insecure", env=env, log=log) as service:
        port = httpx.URL(service.url).port
        assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
    text = log.read_text()
    assert "--insecure: listening on 0.0.0.0 without" in text
    assert "--tls-cert" in text


# ---- the edge's API --------------------------------------------------------------------------------


def test_the_edges_api_with_keys_and_tls(
    built: list[str], env: dict[str, str], own: Authority, tmp_path: Path
) -> None:
    keys, files = tmp_path / "keys", own.issue("127.0.0.1")
    alice = make_key(keys, "alice", env)
    keys.chmod(0o644)
    trusting = ssl.create_default_context(cafile=own.ca)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}
    arguments = ["--serve-key-file", str(keys), "--tls-cert", str(files.cert), "--tls-key", str(files.key)]
    log = tmp_path / "log"
    debug = {**env, "PYTHONASYNCIODEBUG": "1"}
    with heard("edge", *built, "--host", "0.0.0.0", "--port", "0", *arguments, env=debug, log=log) as edge:
        assert edge.url.startswith("https://0.0.0.0:")
        url = edge.url.replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=url, verify=trusting, timeout=60) as http:
            http.headers["authorization"] = f"Bearer {alice}"
            reply = http.post("/v1/chat/completions", json=body)
            assert reply.json()["usage"]["completion_tokens"] == 3
            assert http.post("/v1/chat/completions", json={**body, "nonsense": PROMPT}).status_code == 400
            refused = http.get("/v1/models", headers={"authorization": "Bearer no"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert http.get("/readyz", headers={"authorization": ""}).status_code == 200

            bob = make_key(keys, "bob", env)  # while it runs
            assert http.get("/v1/models", headers={"authorization": f"Bearer {bob}"}).status_code == 200
            keys.write_text(next(line for line in keys.read_text().splitlines() if line.startswith("bob")))
            assert http.get("/v1/models").status_code == 401
    text = log.read_text()
    assert "mode 644" in text
    for secret in (alice, bob, PROMPT):
        assert secret not in text


# ---- to the cloud ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cloud_key(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The cloud's key file, and the edge's with one key of it."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "edge").write_text(make_key(folder / "cloud", "alice", env) + "\n")
    return folder / "cloud", folder / "edge"


def ask(url: str, built: list[str], env: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """`isthmus run` by way of the cloud."""
    arguments = [*built, "--route", "offload", "--max-tokens", "3", "--cloud", url, *options, "--json"]
    return run("run", PROMPT, *arguments, env=env)


def test_a_cloud_with_tls_of_the_own_ca(
    model: str, built: list[str], env: dict[str, str], own: Authority, cloud_key: tuple[Path, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    server, of_edge = cloud_key
    files = own.issue("127.0.0.1")
    stranger = make_authority(tmp_path, "stranger")
    options = ["--model", model, "--precision", "fp32", "--port", "0", "--api-key-file", str(server)]
    with serve(
        "cloud", *options, "--tls-cert", str(files.cert), "--tls-key", str(files.key), env=env
    ) as cloud:
        assert cloud.url.startswith("wss://127.0.0.1:")
        key, ca = ["--api-key-file", str(of_edge)], ["--tls-ca", str(own.ca)]
        done = ask(cloud.url, built, env, *key, *ca)
        assert done.returncode == 0, done.stdout
        assert json.loads(done.stdout)["route"] == "offload"

        assert "--tls-ca" in failed(ask(cloud.url, built, env, *key), 1, "tls_untrusted")["hint"]
        failed(ask(cloud.url, built, env, *key, "--tls-ca", str(stranger.ca)), 1, "tls_untrusted")
        named = cloud.url.replace("127.0.0.1", "localhost")
        error = failed(ask(named, built, env, *key, *ca), 1, "tls_name_mismatch")
        assert "localhost" in error["message"]
        failed(ask(cloud.url, built, env, *ca), 1, "unauthorized")


def test_a_cloud_that_asks_for_client_certificates(
    model: str, built: list[str], env: dict[str, str], own: Authority, tmp_path: Path
) -> None:
    files, client = own.issue("127.0.0.1"), own.issue("edge@example.org")
    stranger = make_authority(tmp_path, "stranger").issue("edge@example.org")
    options = ["--model", model, "--precision", "fp32", "--port", "0", "--tls-client-ca", str(own.ca)]
    with serve(
        "cloud", *options, "--tls-cert", str(files.cert), "--tls-key", str(files.key), env=env
    ) as cloud:
        ca = ["--tls-ca", str(own.ca)]
        shown = ["--tls-client-cert", str(client.cert), "--tls-client-key", str(client.key)]
        assert ask(cloud.url, built, env, *ca, *shown).returncode == 0
        by_env = {
            "ISTHMUS_TLS_CA": str(own.ca),
            "ISTHMUS_TLS_CLIENT_CERT": str(client.cert),
            "ISTHMUS_TLS_CLIENT_KEY": str(client.key),
        }
        assert ask(cloud.url, built, env | by_env).returncode == 0
        for others in ([], ["--tls-client-cert", str(stranger.cert), "--tls-client-key", str(stranger.key)]):
            done = ask(cloud.url, built, env, *ca, *others)
            assert done.returncode == 1
            assert cloud.url in json.loads(done.stdout)["error"]["message"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--tls-ca", "absent.pem"], "bad_tls"),
        (["--tls-client-cert", "absent.pem", "--tls-client-key", "absent.pem"], "bad_tls"),
        (["--tls-client-cert", "absent.pem"], "bad_tls"),
        (["--cloud", "ws://192.0.2.1:1"], "key_in_clear"),
        (["--cloud", "wss://alice:secret@192.0.2.1:1"], "bad_cloud_url"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_sent(
    built: list[str], env: dict[str, str], cloud_key: tuple[Path, Path], options: list[str], code: str
) -> None:
    key = ["--api-key-file", str(cloud_key[1])]
    done = run("run", PROMPT, *built, "--route", "offload", *key, *options, "--json", env=env)
    error = failed(done, 2, code)
    assert "secret" not in json.dumps(error)
    assert cloud_key[1].read_text().strip() not in done.stdout + done.stderr
