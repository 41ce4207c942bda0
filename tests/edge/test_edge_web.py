"""The files of the web chat over HTTP: what is served, how it is marked, and what is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from isthmus.edge.api_errors import add_error_handlers
from isthmus.edge.web import HEADERS, TYPES, page_routes

PAGE = b"<!doctype html><title>Isthmus</title>"


@pytest.fixture
def app(tmp_path: Path) -> Starlette:
    """A folder of files beside a secret, served."""
    root = tmp_path / "page"
    (root / "vendor").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("not for you")
    (tmp_path / "page-not").mkdir()
    (tmp_path / "page-not" / "app.js").write_text("not for you")
    (root / "index.html").write_bytes(PAGE)
    (root / "app.js").write_text("export {}")
    (root / "vendor" / "LICENSE").write_text("as is")
    (root / ".env").write_text("not for you")
    (root / "notes.py").write_text("not for you")
    (root / "out.txt").symlink_to(tmp_path / "secret.txt")
    app = Starlette(routes=page_routes(root))
    add_error_handlers(app)
    return app


@pytest.fixture
async def http(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as http:
        yield http


async def test_the_page_is_at_the_root_and_marked_as_untrusting(http: httpx.AsyncClient) -> None:
    answer = await http.get("/")
    assert (answer.status_code, answer.content) == (200, PAGE)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert HEADERS.items() <= dict(answer.headers).items()
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("path", "kind"),
    [("app.js", "text/javascript"), ("vendor/LICENSE", "text/plain"), ("index.html", "text/html")],
)
async def test_each_file_has_its_type(http: httpx.AsyncClient, path: str, kind: str) -> None:
    answer = await http.get(f"/ui/{path}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_head_tells_of_the_file_without_it(http: httpx.AsyncClient) -> None:
    for path in ("/", "/ui/index.html"):
        answer = await http.head(path)
        assert answer.status_code == 200
        assert int(answer.headers["content-length"]) == len(PAGE)
        assert answer.content == b""


async def test_what_the_browser_has_is_not_sent_again(http: httpx.AsyncClient) -> None:
    first = await http.get("/ui/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = await http.get("/ui/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == HEADERS["content-security-policy"]


@pytest.mark.parametrize("range_", ["bytes=0-3", "bytes=1000-", "nonsense"])
async def test_files_come_whole(http: httpx.AsyncClient, range_: str) -> None:
    for path in ("/", "/ui/index.html"):
        answer = await http.get(path, headers={"range": range_})
        assert (answer.status_code, answer.content) == (200, PAGE)
        assert answer.headers["accept-ranges"] == "none"


@pytest.mark.parametrize(
    "path",
    [
        *("/ui/", "/ui/vendor", "/ui/vendor/", "/ui/none.js", "/ui/.env", "/ui/notes.py", "/ui/out.txt"),
        *("/ui/../secret.txt", "/ui/%2e%2e/secret.txt", "/ui/..%2fsecret.txt", "/ui/vendor/../../secret.txt"),
        *(
            "/ui//etc/hostname.txt",
            "/ui/%2fetc%2fhostname.txt",
            "/ui/..%5csecret.txt",
            "/ui/../page-not/app.js",
        ),
        *("/ui/a%00.js", "/ui/%ff.js", "/ui/" + "x" * 5000 + ".js", "/ui/app.js/x.js"),
    ],
)
async def test_nothing_else_is_found(app: Starlette, path: str) -> None:
    async def as_it_stands(scope: Scope, receive: Receive, send: Send) -> None:
        """httpx resolves dots; servers hand a path on as it came."""
        await app({**scope, "path": unquote(path), "raw_path": path.encode()}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(as_it_stands), base_url="http://edge") as http:
        answer = await http.get("/")
    assert answer.status_code == 404, path
    assert answer.json()["error"]["code"] == "unknown_path"


async def test_files_are_only_read(http: httpx.AsyncClient) -> None:
    for path in ("/", "/ui/app.js"):
        answer = await http.post(path)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_every_file_of_the_installed_page_can_be_served() -> None:
    web = Path(str(files("isthmus") / "web"))
    found = [file for file in web.rglob("*") if file.is_file()]
    assert web / "index.html" in found
    assert [file for file in found if file.suffix not in TYPES or file.name.startswith(".")] == []
