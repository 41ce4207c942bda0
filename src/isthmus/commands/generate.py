"""`isthmus run`: one prompt, one answer, by the route asked for."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.commands.explain import explanation
from isthmus.commands.options import ANSWER, CLOUD, ROUTER, WAY, Flags, SeedOption, with_flags
from isthmus.commands.output import JsonFlag, err, human_bytes, print_json, write_text
from isthmus.commands.setup import provide_pack, running_agent
from isthmus.config import Settings
from isthmus.protocol.errors import IsthmusError, RequestError

if TYPE_CHECKING:
    from isthmus.edge.api_models import Ask
    from isthmus.edge.requests import Finished, GenerateRequest, Started
    from isthmus.splitter.pack import Pack

WARM_S = 2.0


@with_flags(WAY, CLOUD, ROUTER, ANSWER)
def run(
    flags: Flags,
    prompt: Annotated[
        str,
        typer.Argument(
            help='The question; "-" reads it from standard input, less one newline at its end.',
            metavar="PROMPT",
        ),
    ],
    seed: SeedOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the prompt to the model as it is, without its chat template.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the decision: every way, what it takes, and why.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Answer one prompt: here, split over two machines, or in the cloud."""
    settings = Settings(flags)
    text = read_stdin() if prompt == "-" else prompt
    pack = provide_pack(settings)
    request = make_request(pack, settings, prompt_ids(pack, text, raw=raw), seed)
    started, finished = asyncio.run(_generate(pack, settings, request, stream=not json))
    if json:
        print_json(result_json(request, started, finished))
        return
    if explain:
        err.print(explanation(started.decision))
    err.print(summary_line(started, finished), style="dim", markup=False)


def prompt_ids(pack: Pack, text: str, *, raw: bool) -> list[int]:
    """Token ids of a single user message, or of the bare text with `raw`."""
    from isthmus.edge.chat import ChatTemplate

    template = ChatTemplate.from_pack(pack)
    if raw:
        return template.encode_raw(text)
    return template.encode([{"role": "user", "content": text}])


def read_stdin() -> str:
    """All of standard input as text, without the newline that `echo` and editors put at its end."""
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"standard input is no UTF-8: byte {error.start} is {error.object[error.start]:#04x}",
            code="invalid_utf8",
            hint="convert it first, for example with iconv",
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def make_request(pack: Pack, settings: Settings, ids: list[int], seed: int | None) -> GenerateRequest:
    """A GenerateRequest from settings; sampling defaults come from the model's generation.json."""
    import secrets

    from isthmus.edge.advice import sampling_params
    from isthmus.edge.requests import GenerateRequest

    sampling = sampling_params(
        {"temperature": settings.real("temperature")},
        pack.generation(),
        temperature=0.0,
        seed=secrets.randbits(63) if seed is None else seed,
    )
    limit = settings.resolve("max_tokens")
    max_tokens = int(str(limit.value))
    if limit.origin == "default":  # nobody asked for so many: what fits will do
        max_tokens = max(1, min(max_tokens, pack.spec.context_length - len(ids)))
    how = asked_way(settings)
    return GenerateRequest(
        prompt_ids=tuple(ids),
        max_tokens=max_tokens,
        sampling=sampling,
        end_ids=tuple(pack.spec.eos_ids),
        route=how.route or "auto",
        split=how.split,
        shape=how.shape,
        row_format=how.codec,
        fallback=how.fallback or "any",
        slo=how.expected(),
        max_cost_usd=how.max_cost_usd,
    )


def asked_way(settings: Settings) -> Ask:
    """Route, K, shape, codec and what is expected: flags over what is set. A K in config.toml forbids no
    `--route local`."""
    from isthmus.edge.api_models import Ask, SloAsk

    def said(*, by_flag: bool) -> Ask:
        def value(name: str) -> object:
            resolved = settings.resolve(name)
            return resolved.value if (resolved.origin == "flag") is by_flag else None

        slo = {name: value(f"slo_{name}") for name in SloAsk.model_fields}
        way = {name: value(name) for name in Ask.model_fields if name != "slo"}
        return Ask.model_validate({**way, "slo": SloAsk.model_validate(slo)})

    return said(by_flag=True).over(said(by_flag=False))


async def _generate(
    pack: Pack, settings: Settings, request: GenerateRequest, *, stream: bool
) -> tuple[Started, Finished]:
    from isthmus.edge.requests import Finished, Started, Token

    started: Started | None = None
    async with running_agent(pack, settings) as agent:
        open_way = request.split is None and request.route in ("auto", "split")
        if open_way and settings.texts("cloud"):
            # A router that has not seen the cloud yet would reckon with guesses, and this process asks once.
            await agent.warm(timeout_s=WARM_S)
        async with aclosing(agent.generate(request)) as events:
            async for event in events:
                if isinstance(event, Started):
                    started = event
                elif isinstance(event, Token) and stream:
                    write_text(event.text)
                elif isinstance(event, Finished):
                    if stream:
                        write_text(event.tail + "\n")
                    assert started is not None
                    return started, event
    raise IsthmusError("the agent ended without a last event", hint="report this; it is a fault of the agent")


def result_json(request: GenerateRequest, started: Started, finished: Finished) -> dict[str, Any]:
    """The object `isthmus run --json` prints. Route, K and shape are those at the end; `events` says what
    moved the request, and the decision how it began."""
    from dataclasses import asdict

    return {
        "text": finished.text,
        "token_ids": list(finished.token_ids),
        "prompt_tokens": len(request.prompt_ids),
        "finish_reason": finished.finish_reason,
        "route": finished.route,
        "split": finished.split,
        "shape": finished.shape,
        "decision": started.decision.to_dict(),
        "timings": asdict(finished.timings),
        "link": asdict(finished.link),
        "counts": finished.counts,
        "events": list(finished.events),
    }


def summary_line(started: Started, finished: Finished) -> str:
    """One line about how the answer came to be."""
    timings, link = finished.timings, finished.link
    began, ended = _way(started), _way(finished)
    count = len(finished.token_ids)
    cut = ", as many as were allowed" if finished.finish_reason == "length" else ""
    parts = [
        ended if ended == began else f"{ended}, begun as {began}",
        f"{count} token{'s' * (count != 1)}{cut}",
        f"first after {timings.ttft_s:.2f} s",
        f"{timings.decode_tokens_per_s:.1f} tok/s",
    ]
    if link.bytes_up or link.bytes_down:
        parts.append(f"{human_bytes(link.bytes_up)} up, {human_bytes(link.bytes_down)} down")
    return " · ".join(parts)


def _way(at: Started | Finished) -> str:
    """The route of one moment, and where the layers are."""
    where = {"local": "all layers here", "offload": "all layers in the cloud"}.get(
        at.route, f"{at.split} layers here, shape {at.shape}"
    )
    return f"{at.route} ({where})"
