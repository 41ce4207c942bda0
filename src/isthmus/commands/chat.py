"""`isthmus chat`: a conversation in the terminal; Ctrl-C stops a reply, not the program."""

from __future__ import annotations

import asyncio
import json as json_module
import secrets
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from isthmus.commands.explain import explanation
from isthmus.commands.generate import make_request, result_json, summary_line
from isthmus.commands.options import ANSWER, CLOUD, ROUTER, WAY, Flags, SeedOption, with_flags
from isthmus.commands.output import JsonFlag, err, out, print_json, write_text
from isthmus.commands.setup import provide_pack, running_agent
from isthmus.config import Settings
from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.edge.agent import Agent
    from isthmus.edge.requests import Finished, GenerateRequest, Started
    from isthmus.splitter.pack import Pack

T = TypeVar("T")

HELP = """\
/route auto|local|split|offload   the route of the next replies
/split K                          layers on the edge (with /route split); /split alone lets the router choose
/stats                            how the last reply came to be
/explain                          the last decision with its candidates
/save FILE                        the conversation as JSON
/new                              forget the conversation
/quit                             leave (so does Ctrl-D); Ctrl-C stops a reply"""


@with_flags(WAY, CLOUD, ROUTER, ANSWER)
def chat(flags: Flags, seed: SeedOption = None, json: JsonFlag = False) -> None:
    """Chat in the terminal, over the edge, the cloud, or both.

    With --json the conversation runs on stderr, and stdout gets it as one object at its end.
    """
    pack = provide_pack(Settings(flags))
    conversation = _Conversation(pack, flags, seed, json)
    conversation.run()
    if json:
        print_json({"messages": conversation.messages, "turns": conversation.turns})
    if any("error" in turn for turn in conversation.turns) and not sys.stdin.isatty():
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
    """The messages so far, the flags as changed by commands, and the last reply.

    The terminal is read in the main thread, where Ctrl-C arrives; the agent lives in a loop of its own.
    """

    def __init__(self, pack: Pack, flags: Flags, seed: int | None, json: bool) -> None:
        from isthmus.edge.chat import ChatTemplate

        self.pack, self.flags, self.seed, self.json = pack, flags, seed, json
        self.template = ChatTemplate.from_pack(pack)
        self.screen = err if json else out
        self.messages: list[dict[str, str]] = []
        self.turns: list[dict[str, Any]] = []
        self.last: tuple[Started, Finished] | None = None

    def run(self) -> None:
        """Until the end of the input, or /quit."""
        if sys.stdin.isatty():
            with suppress(ImportError):  # not on every system
                import readline  # noqa: F401 - gives input() editing and a history
        with _background_loop() as loop:
            context = running_agent(self.pack, Settings(self.flags))
            agent = _wait(loop, context.__aenter__())
            try:
                name = self.pack.spec.base_name or "model"
                self.tell(f"{name} · {self.pack.spec.num_layers} layers · /help for commands")
                while (line := self.read_line()) is not None:
                    try:
                        if line in ("/quit", "/exit"):
                            return
                        if line.startswith("/"):
                            self.command(line)
                        elif line:
                            self.reply(loop, agent, line)
                    except IsthmusError as error:
                        self.turns.append({"error": error.to_dict()})
                        err.print(str(error), style="red", markup=False)
                    except OSError as error:
                        err.print(str(error), style="red", markup=False)
            finally:
                _wait(loop, context.__aexit__(None, None, None))

    def tell(self, text: str) -> None:
        """A line of ours, not of the model."""
        self.screen.print(text, markup=False, soft_wrap=True)

    def read_line(self) -> str | None:
        """The next line of input, None at its end. Ctrl-C discards what was typed."""
        prompt = "› " if sys.stdin.isatty() else ""
        if self.json:  # input() would write it to stdout
            self.screen.print(prompt, end="")
            prompt = ""
        try:
            return input(prompt).strip()
        except EOFError:
            if sys.stdin.isatty():
                self.tell("")
            return None
        except KeyboardInterrupt:
            self.tell("\n(/quit or Ctrl-D leaves)")
            return ""

    def command(self, line: str) -> None:
        """Obey one line that begins with a slash. Raises ConfigError, OSError."""
        name, _, value = line.partition(" ")
        value = value.strip()
        match name:
            case "/help":
                self.tell(HELP)
            case "/route":
                Settings({**self.flags, "route": value}).text("route")
                self.flags["route"] = value
                if value != "split":
                    self.flags["split"] = None
            case "/split":
                Settings({**self.flags, "split": value or None}).number("split")
                self.flags["split"] = value or None
                self.flags["route"] = "split" if value else self.flags.get("route")
            case "/stats":
                self.tell(summary_line(*self.last) if self.last else "no reply yet")
            case "/explain":
                self.screen.print(explanation(self.last[0].decision) if self.last else "no reply yet")
            case "/save":
                path = Path(value or "conversation.json").expanduser()
                text = json_module.dumps(self.messages, ensure_ascii=False, indent=2)
                path.write_text(text + "\n", encoding="utf-8")
                self.tell(f"saved to {path}")
            case "/new":
                self.messages.clear()
                self.tell("a new conversation")
            case _:
                self.tell(f"there is no command {name}\n{HELP}")

    def reply(self, loop: asyncio.AbstractEventLoop, agent: Agent, line: str) -> None:
        """Stream one reply. Ctrl-C ends it, on both machines; what was said by then stays in the
        conversation. Raises what the agent raises."""
        messages = [*self.messages, {"role": "user", "content": line}]
        seed = secrets.randbits(63) if self.seed is None else self.seed
        request = make_request(self.pack, Settings(self.flags), self.template.encode(messages), seed)
        reply = _Reply(request)
        stopped = _wait(loop, self._stream(agent, reply), on_interrupt=reply.stop)
        if stopped:
            self.tell(" (stopped)")
        elif reply.started is not None and reply.finished is not None:
            self.last = (reply.started, reply.finished)
            self.turns.append(result_json(request, reply.started, reply.finished))
        if reply.said:
            self.messages = [*messages, {"role": "assistant", "content": "".join(reply.said)}]

    async def _stream(self, agent: Agent, reply: _Reply) -> bool:
        """Write the reply as it comes; was it stopped?"""
        from isthmus.edge.requests import Finished, Started

        reply.task = asyncio.current_task()
        try:
            async with aclosing(agent.generate(reply.request)) as events:
                async for event in events:
                    if isinstance(event, Started):
                        reply.started = event
                        continue
                    last = isinstance(event, Finished)
                    text = event.tail if isinstance(event, Finished) else event.text
                    if isinstance(event, Finished):
                        reply.finished = event
                    reply.said.append(text)
                    write_text(text + "\n" * last, to_stderr=self.json)
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
