"""`isthmus chat`: a conversation in the terminal; Ctrl-C stops a reply, not the program."""

from __future__ import annotations

import asyncio
import secrets
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from isthmus.commands.chat_commands import Talk, obey
from isthmus.commands.chat_screen import PlainScreen, Screen, event_text, has_terminal, status_line
from isthmus.commands.generate import make_request, result_json
from isthmus.commands.options import ANSWER, CLOUD, ROUTER, WAY, Flags, SeedOption, with_flags
from isthmus.commands.output import JsonFlag, err, print_json
from isthmus.commands.setup import provide_pack, running_agent
from isthmus.config import Settings
from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.edge.agent import Agent
    from isthmus.edge.requests import Finished, GenerateRequest, Started
    from isthmus.splitter.pack import Pack

T = TypeVar("T")


@with_flags(WAY, CLOUD, ROUTER, ANSWER)
def chat(flags: Flags, seed: SeedOption = None, json: JsonFlag = False) -> None:
    """Chat in the terminal, over the edge, the cloud, or both.

    With --json the conversation runs on stderr, and stdout gets it as one object at its end.
    """
    pack = provide_pack(Settings(flags))
    talk = Talk(flags)
    with _background_loop() as loop:
        _Conversation(pack, talk, loop, seed, json=json).run()
    if json:
        print_json({"messages": talk.messages, "turns": talk.turns})
    if any("error" in turn for turn in talk.turns) and not sys.stdin.isatty():
        raise typer.Exit(1)  # nobody was there to see it


@dataclass
class _Reply:
    """One reply while it comes."""

    request: GenerateRequest
    started: Started | None = None
    finished: Finished | None = None
    said: list[str] = field(default_factory=list)
    task: asyncio.Task[Any] | None = None

    def stop(self) -> None:
        """End it, once: a second cancellation would disturb the cleaning up after the first."""
        if self.task is not None:
            self.task.cancel()
            self.task = None


class _Conversation:
    """Reads questions and commands, and has the agent answer.

    The terminal is read in the main thread, where Ctrl-C arrives; the agent lives in `loop`, in another one.
    """

    def __init__(
        self, pack: Pack, talk: Talk, loop: asyncio.AbstractEventLoop, seed: int | None, *, json: bool
    ) -> None:
        from isthmus.edge.chat import ChatTemplate

        self.pack, self.talk, self.loop, self.seed = pack, talk, loop, seed
        self.name = pack.spec.base_name or "model"
        self.template = ChatTemplate.from_pack(pack)
        self.clouds: list[dict[str, Any]] = []
        self.screen: Screen = PlainScreen(to_stderr=json)
        self.plain = json or not has_terminal()

    def run(self) -> None:
        """Until the end of the input, or /quit."""
        context = running_agent(self.pack, Settings(self.talk.flags))
        agent = _wait(self.loop, context.__aenter__())
        try:
            if not self.plain:
                self.screen = self._terminal(agent)
            self.screen.tell(f"{self.name} · {self.pack.spec.num_layers} layers · /help for commands")
            while (line := self.screen.read_line()) is not None:
                try:
                    if line in ("/quit", "/exit"):
                        return
                    if line.startswith("/"):
                        self.screen.tell(obey(self.talk, line))
                    elif line:
                        self.reply(agent, line)
                except IsthmusError as error:
                    self.talk.turns.append({"error": error.to_dict()})
                    err.print(str(error), style="red", markup=False)
                except OSError as error:
                    err.print(str(error), style="red", markup=False)
        finally:
            _wait(self.loop, context.__aexit__(None, None, None))

    def _terminal(self, agent: Agent) -> Screen:
        """The screen with a status line. The agent is asked in its own thread, for the next time."""
        from isthmus.commands.chat_terminal import TerminalScreen

        def look() -> None:
            self.clouds = agent.stats()["clouds"]

        def status() -> str:
            self.loop.call_soon_threadsafe(look)
            return status_line(self.name, self.talk, self.clouds)

        keep = Settings(self.talk.flags).text("chat_history") == "on"
        return TerminalScreen(status, keep_history=keep)

    def reply(self, agent: Agent, line: str) -> None:
        """Stream one reply. Ctrl-C ends it, on both machines; what was said by then stays in the
        conversation. Raises what the agent raises."""
        talk = self.talk
        messages = [*talk.messages, {"role": "user", "content": line}]
        seed = secrets.randbits(63) if self.seed is None else self.seed
        request = make_request(self.pack, Settings(talk.flags), self.template.encode(messages), seed)
        reply = _Reply(replace(request, privacy=talk.privacy))
        stopped = _wait(self.loop, self._stream(agent, reply), on_interrupt=reply.stop)
        if stopped:
            self.screen.tell(" (stopped)")
        elif reply.started is not None and reply.finished is not None:
            talk.last = (reply.started, reply.finished)
            talk.turns.append(result_json(request, reply.started, reply.finished))
        if reply.said:
            talk.messages = [*messages, {"role": "assistant", "content": "".join(reply.said)}]

    async def _stream(self, agent: Agent, reply: _Reply) -> bool:
        """Write the reply as it comes; was it stopped?"""
        from isthmus.edge.requests import Finished, Moved, Started, Token

        reply.task = asyncio.current_task()
        try:
            async with self.screen.answering() as answer, aclosing(agent.generate(reply.request)) as events:
                async for event in events:
                    match event:
                        case Started():
                            reply.started = event
                        case Moved():
                            for text in filter(None, map(event_text, event.events)):
                                answer.note(text)
                        case Token():
                            reply.said.append(event.text)
                            answer.feed(event.text)
                        case Finished():
                            reply.finished = event
                            reply.said.append(event.tail)
                            answer.feed(event.tail)
        except asyncio.CancelledError:
            return True
        return False


@contextmanager
def _background_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever, name="isthmus-chat")
        thread.start()
        try:
            yield loop
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


def _wait(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, T],
    *,
    on_interrupt: Callable[[], object] = lambda: None,
) -> T:
    """The result of `work`, run in `loop`. Ctrl-C calls `on_interrupt` there, and the wait goes on."""
    future = asyncio.run_coroutine_threadsafe(work, loop)
    while True:
        try:
            return future.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(on_interrupt)
