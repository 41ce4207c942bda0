"""`isthmus relay`: a slow, faulty or recorded link between two processes, for trying and testing."""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from isthmus.commands.output import JsonFlag, out, print_error, print_json
from isthmus.protocol.errors import ConfigError
from isthmus.relay import FaultScript, Happened, LinkShape, Relay, Trace, parse_address
from isthmus.relay.control import Lines, obey

READ_BYTES: Final = 4096


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
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Take changes from standard input while it runs, one per line: `shape RTT_MS UP_MBPS "
            "DOWN_MBPS` (0 Mbit/s = no limit). Each is answered with a line on standard output.",
        ),
    ] = False,
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
    lines = Lines()

    def obey_input() -> None:
        """What standard input has; called when it has something, or has ended."""
        data = os.read(sys.stdin.fileno(), READ_BYTES)
        if not data:
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        for command in lines.feed(data):
            try:
                _told(obey(command, line), as_json=json)
            except ConfigError as error:
                print_error(error.to_dict(), as_json=json)

    async def serve() -> None:
        host, port = await line.start()
        if json:
            print_json({"ready": "relay", "url": f"ws://{host}:{port}"})
        else:
            out.print(f"ready relay ws://{host}:{port}", markup=False, soft_wrap=True)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        if control:
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), obey_input)
        await stop.wait()
        await line.aclose()

    # select() waits to the microsecond; the default loop's epoll rounds every delay up to a millisecond.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(serve())


def _told(shape: LinkShape, *, as_json: bool) -> None:
    if as_json:
        print_json({"shape": asdict(shape)})
    else:
        figures = f"RTT {shape.rtt_ms:g} ms, {shape.up_mbps:g} Mbit/s up, {shape.down_mbps:g} down"
        out.print(f"shape: {figures}", markup=False, soft_wrap=True)


def _tell(happened: Happened) -> None:
    where = "" if happened.connection is None else f" connection {happened.connection}"
    typer.echo(f"fault at {happened.at_s:.3f} s: {happened.fault}{where}", err=True)
