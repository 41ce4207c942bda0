"""`--pull-from-cloud`: this device takes its blocks from the cloud it works with."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin

from isthmus.commands.output import progress_bar
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError, IsthmusError

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.pack_fetch import Wanted
    from isthmus.splitter.spec import ModelSpec

_WS_TO_HTTP: Final = {"ws": "http", "wss": "https"}


def pull_pack(settings: Settings, key: str | None, context: ssl.SSLContext | None) -> Pack:
    """The pack of the first cloud that offers one, with the blocks that the settings' way needs: with a split
    K those of the first K layers, and the head in the U-shape; else all.

    Raises ConfigError without a cloud, for an address or key that may not be used, or where the cloud has
    another model than the one that was named; CloudUnreachableError where TLS fails; what `fetch_pack` does.
    """
    from isthmus.edge.tls import tls_error
    from isthmus.splitter.download import Access
    from isthmus.splitter.pack_fetch import PackSource, fetch_pack

    urls = settings.texts("cloud")
    access = Access({"Authorization": f"Bearer {key}"} if key else {}, context)
    sources = [PackSource(pack_url(url, key), url, access) for url in urls]
    with progress_bar() as progress:
        try:
            return fetch_pack(sources, _wanted(settings), progress=progress)
        except IsthmusError as error:
            why = getattr(error.__cause__, "reason", None)
            if isinstance(why, ssl.SSLError):
                raise tls_error(urls[0], why) from error
            raise


def pack_url(url: str, key: str | None) -> str:
    """Where a cloud's pack lies: beside its sessions' path. ConfigError as for sessions."""
    from isthmus.edge.link import check_url

    scheme, _, rest = check_url(url, key).partition("://")
    return urljoin(f"{_WS_TO_HTTP[scheme]}://{rest}", "pack/")


def _wanted(settings: Settings) -> Wanted:
    from isthmus.commands.generate import asked_way
    from isthmus.splitter.pack_fetch import blocks_for
    from isthmus.splitter.spec import canonical_base_name

    model, way = settings.resolve("model"), asked_way(settings)
    blocks = blocks_for(way.split, head=way.shape == "u")

    def wanted(spec: ModelSpec) -> frozenset[str]:
        asked = canonical_base_name(str(model.value))
        if model.origin != "default" and asked != spec.base_name:
            raise ConfigError(
                f"the cloud has the model {spec.base_name!r}, {model.value!r} was asked for",
                code="other_model",
                hint="leave the model out to take the cloud's, or name another cloud",
            )
        return blocks(spec)

    return wanted
