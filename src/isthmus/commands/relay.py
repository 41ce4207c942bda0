"""`isthmus relay`: a slow link between two processes, for trying and testing."""

from __future__ import annotations

import asyncio
import selectors
import signal
from typing import Annotated

import typer

from isthmus.commands.output import JsonFlag, out, print_json
from isthmus.relay import LinkShape, Relay, parse_address


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
    seed: Annotated[int, typer.Option(help="Seed of the jitter.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Pass TCP connections on through an emulated slow link, until interrupted."""
    shape = LinkShape(rtt_ms=rtt_ms, jitter_ms=jitter_ms, up_mbps=up_mbps, down_mbps=down_mbps)
    line = Relay(parse_address(listen, what="LISTEN"), parse_address(target, what="TARGET"), shape, seed=seed)

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
