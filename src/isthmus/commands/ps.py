"""`isthmus ps`: what of this user serves on this machine, and what it is doing."""

from __future__ import annotations

import json as json_module
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, build_opener

import psutil
from rich.table import Table

from isthmus.commands.options import CLOUD, Flags, with_flags
from isthmus.commands.output import JsonFlag, human_bytes, out, plain_text, print_json
from isthmus.commands.running import ServedProcess, served_processes, uptime_s
from isthmus.commands.setup import read_api_key
from isthmus.config import Settings
from isthmus.edge.tls import client_context, tls_error
from isthmus.protocol.errors import CloudUnreachableError, IsthmusError, RejectedError

TIMEOUT_S: Final = 3.0
MOST_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Seen:
    """A process, its resident memory, and what it says of itself: `stats` as GET /v1/stats answers them, or
    `error`, why it did not."""

    process: ServedProcess
    uptime_s: float
    rss_bytes: int | None
    stats: dict[str, Any] | None
    error: dict[str, str] | None

    def to_json(self) -> dict[str, Any]:
        known = asdict(self)
        return {**known.pop("process"), **known}


@with_flags({name: CLOUD[name] for name in ("api_key_file", "tls_ca")})
def ps(flags: Flags, json: JsonFlag = False) -> None:
    """List what serves on this machine: model, layers, memory, requests, clouds.

    The key of a server that asks for one comes from --api-key-file or ISTHMUS_API_KEY.
    """
    settings = Settings(flags)
    key = read_api_key(settings)
    opener = _opener(settings.text("tls_ca"))
    seen = [look(process, opener, key) for process in served_processes()]
    if json:
        print_json({"processes": [one.to_json() for one in seen]})
    elif not seen:
        out.print("nothing is served here; start with: isthmus serve edge", markup=False)
    else:
        out.print(table(seen))


# ---- asking -------------------------------------------------------------------------------------------


def look(process: ServedProcess, opener: OpenerDirector, key: str | None) -> Seen:
    """Ask one process; whoever does not answer is not an error of ours."""
    stats, error = None, None
    try:
        stats = ask(process.url, opener, key)
    except IsthmusError as failure:
        error = failure.to_dict()
    try:
        rss = int(psutil.Process(process.pid).memory_info().rss)
    except psutil.Error:
        rss = None
    return Seen(process, uptime_s(process), rss, stats, error)


def ask(url: str, opener: OpenerDirector, key: str | None) -> dict[str, Any]:
    """What GET /v1/stats of the server at `url` answers. RejectedError, CloudUnreachableError."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with opener.open(Request(_stats_url(url), headers=headers), timeout=TIMEOUT_S) as reply:
            answer = json_module.loads(reply.read(MOST_BYTES))
    except HTTPError as error:
        with error:
            if error.code in (401, 403):
                raise RejectedError(
                    f"{url} asks for a key it knows (HTTP {error.code})",
                    code="unauthorized",
                    hint="give it by --api-key-file or ISTHMUS_API_KEY",
                ) from error
            raise RejectedError(f"{url} answered HTTP {error.code}") from error
    except (URLError, TimeoutError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLError):
            raise tls_error(url, reason) from error
        raise CloudUnreachableError(
            f"{url} does not answer: {reason}", code="no_answer", hint="it may be busy loading; try again"
        ) from error
    except (OSError, ValueError) as error:
        raise CloudUnreachableError(f"{url} does not answer as a server of ours: {error}") from error
    if not isinstance(answer, dict):
        raise CloudUnreachableError(f"{url} does not answer as a server of ours")
    return answer


def _stats_url(url: str) -> str:
    """Where to ask on this machine a server that tells others to use `url`."""
    parts = urlsplit(url)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(parts.hostname or "")
    scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
    return f"{scheme}://{parts.netloc if host is None else f'{host}:{parts.port}'}/v1/stats"


def _opener(ca: str | None) -> OpenerDirector:
    """HTTP to this machine, so past any proxy. The name in a certificate is the one that other machines call
    this one by, so it is not compared with the address used here."""
    context = client_context(ca)
    context.check_hostname = False
    return build_opener(ProxyHandler({}), HTTPHandler(), HTTPSHandler(context=context))


# ---- showing ------------------------------------------------------------------------------------------


def table(seen: Iterable[Seen]) -> Table:
    """A block of lines per process: a heading, then name and value."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for number, one in enumerate(seen):
        if number:
            grid.add_row()
        grid.add_row(plain_text(one.process.kind, "bold"), plain_text(one.process.url, "bold"))
        for name, value in _lines(one):
            grid.add_row(
                plain_text(f"  {name}", "dim"), plain_text(value, "red" if name == "trouble" else "")
            )
    return grid


def _lines(one: Seen) -> Iterator[tuple[str, str]]:
    rss = "" if one.rss_bytes is None else f", {human_bytes(one.rss_bytes)} resident"
    yield "process", f"{one.process.pid}, up {duration(one.uptime_s)}{rss}"
    yield "model", one.process.model
    if one.error is not None:
        hint = f"; {one.error['hint']}" if one.error["hint"] else ""
        yield "trouble", f"{one.error['message']}{hint}"
    elif one.stats is not None:
        try:
            yield from list((_of_cloud if one.process.kind == "cloud" else _of_edge)(one.stats))
        except (KeyError, TypeError, ValueError) as error:
            yield "trouble", f"its figures are of another version of Isthmus: {error!r}"


def _of_edge(stats: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "layers", f"{loaded(stats)}, on {stats['provider']}"
    kept = f", {human_bytes(stats['kept_cache_bytes'])} kept" if stats["kept_caches"] else ""
    yield (
        "memory",
        f"weights {human_bytes(stats['weights_bytes'])}, KV {human_bytes(stats['kv_bytes'])}{kept}",
    )
    routes = ", ".join(f"{count} {route}" for route, count in sorted(stats["routes"].items()))
    yield (
        "requests",
        f"{stats['running']} running, {stats['waiting']} waiting; so far {stats['requests']}"
        + (f": {routes}" if routes else ""),
    )
    for cloud in stats["clouds"]:
        yield "cloud", f"{cloud['url']} {cloud_state(cloud)}"


def _of_cloud(stats: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "layers",
        f"all, in {stats['precision']}" + (f" on {where}" if (where := stats.get("device")) else ""),
    )
    used, cached, total = (stats[f"pages_{name}"] for name in ("used", "cached", "total"))
    yield "KV", f"{used} of {total} pages in use, {cached} kept for prefixes"
    yield (
        "requests",
        f"{stats['running']} running, {stats['waiting']} waiting; {stats['sessions']} sessions, "
        f"{stats['connections']} edges connected; {stats['tokens_sampled_total']} tokens so far",
    )


def loaded(stats: dict[str, Any]) -> str:
    """Which layers are in memory, and the head: "0–11, 20–29 + head of 30"."""
    layers: list[int] = sorted(stats["loaded_layers"])
    model = stats["model"]
    sizes = model["bytes_per_block"]  # embedding, layers, head
    rest = stats["weights_bytes"] - sum(sizes[1 + layer] for layer in layers) - (sizes[0] if layers else 0)
    parts = [f"{low}–{high}" if high > low else f"{low}" for low, high in _ranges(layers)]
    with_head = " + head" if layers and rest > 0 else ""
    return f"{', '.join(parts) or 'none loaded yet'}{with_head} of {model['num_layers']}"


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs without gap, (first, last)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def cloud_state(cloud: dict[str, Any]) -> str:
    """Of one entry of `clouds` in an agent's stats: up with its round trip, or why not."""
    if cloud["state"] == "up":
        rtt_s = cloud["rtt_s"]
        return "up" if rtt_s is None else f"up, {rtt_s * 1e3:.3g} ms"
    if cloud["state"] == "unknown":
        return "not connected"
    return f"{cloud['state']}: {cloud['detail']}" if cloud["detail"] else str(cloud["state"])


def duration(seconds: float) -> str:
    """93784 → '1 d 2 h'."""
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in parts[:2])
