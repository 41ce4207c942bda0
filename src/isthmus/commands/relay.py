"""`isthmus relay`: a slow, faulty or recorded link between two processes, for trying and testing."""

from __future__ import annotations

import asyncio
import selectors
import signal
from pathlib import Path
from typing import Annotated

import typer

from isthmus.commands.output import JsonFlag, out, print_json
from isthmus.relay import FaultScript, Happened, LinkShape, Relay, Trace, parse_address


def relay(
    listen: Annotated[str, typer.Argument(help="host:port to listen on; port 0 picks a free one.")],
    target: Annotated[str, typer.Argument(help="host:port to pass connections on to.")],
    rtt_ms: Annotated[float, typer.Option(help="Added round-trip time, half each way.")] = 0.0,
    jitter_ms: Annotated[float, typer.Option(help="Most random delay added to a round trip.")] = 0.0,
    up_mbps: Annotated[
        float, typer.Option(help="Bandwidth towards the target in Mbit/s; 0 = no limit.")
    ] = 0.0,
    down_mbps: Annotated[
        float, typer.Option(help="Bandwidth from the target in Mbit/s; 0 = no limit.")
    ] = 0.0,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace",
            help="Bandwidth over time from PREFIX.up and PREFIX.down: Mahimahi's format, one millisecond per "
            "line at which 1500 bytes may pass.",
            metavar="PREFIX",
        ),
    ] = None,
    faults: Annotated[
        Path | None,
        typer.Option(
            "--faults",
            help="What goes wrong, one fault per line, for example `after 2.5: stall 1.5`, "
            "`every 3..8: one of cut, half-open, refuse 2`, `at byte 5000 up: cut`, "
            "`at message 7 down: stall 1`, `after 0: slice 1`.",
            metavar="SCRIPT",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the jitter and of the faults.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Pass TCP connections on through an emulated link, until interrupted. Faults are told on stderr."""
    line = Relay(
        parse_address(listen, what="LISTEN"),
        parse_address(target, what="TARGET"),
        LinkShape(rtt_ms=rtt_ms, jitter_ms=jitter_ms, up_mbps=up_mbps, down_mbps=down_mbps),
        seed=seed,
        trace=None if trace is None else Trace.load(trace),
        script=None if faults is None else FaultScript.load(faults),
    )
    line.faults.on_fault = _tell

    async def serve() -> None:
        host, port = await line.start()
        if json:
            print_json({"ready": "relay", "url": f"ws://{host}:{port}"})
        else:
            out.print(f"ready relay ws://{host}:{port}", markup=False, soft_wrap=True)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        await line.aclose()

    # select() waits to the microsecond; the default loop's epoll rounds every delay up to a millisecond.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(serve())


def _tell(happened: Happened) -> None:
    where = "" if happened.connection is None else f" connection {happened.connection}"
    typer.echo(f"fault at {happened.at_s:.3f} s: {happened.fault}{where}", err=True)
