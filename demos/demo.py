"""`make demo`: one question, three routes, two processes, through the public command line and HTTP API.

Pulls and builds the default model (once), starts the cloud service and the edge agent as two processes on
this machine, asks the same question by each route, prints what happened, kills the cloud in the middle of an
answer, and on a terminal leaves the web chat open until Ctrl-C. Without a terminal it looks whether the web
chat is served, stops everything and exits 0.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from typing import Any

from rich.console import Console
from rich.table import Column, Table

QUESTION = "What is the capital of France?"
LONG_QUESTION = "Tell me about the city of Paris."
MAX_TOKENS = 48
KILLED_AFTER = 8  # tokens
ISTHMUS = [sys.executable, "-m", "isthmus"]
console = Console(highlight=False, soft_wrap=True)


def tell(text: str) -> None:
    """A line about what happens next, out before a child process writes its own."""
    console.print(f"[bold]▸[/] {text}")
    sys.stdout.flush()


def command(*arguments: str) -> dict[str, Any]:
    """Run `isthmus ARGUMENTS --json`; progress goes to the terminal, the result comes back."""
    done = subprocess.run([*ISTHMUS, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    result: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    if done.returncode:
        problem = result.get("error", {"message": f"exit code {done.returncode}", "hint": ""})
        sys.exit(f"isthmus {' '.join(arguments)}: {problem['message']} {problem['hint']}")
    return result


@contextmanager
def service(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`isthmus serve …` as its own process; yields its URL once it is ready, stops it at the end.

    Its log is kept apart, and shown only if it does not start.
    """
    with tempfile.TemporaryFile("w+") as log:
        command = [*ISTHMUS, "serve", *arguments, "--json"]
        # A session of its own: at Ctrl-C they are stopped by us, one after the other.
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            answer = json.loads(line) if line else {}
            if "url" not in answer:
                log.seek(0)
                error = answer.get("error", {"message": "it ended without a word"})
                sys.exit(f"{log.read()}isthmus serve {arguments[0]} did not start: {error['message']}")
            yield answer["url"], child
        finally:
            child.terminate()
            child.wait()


@contextmanager
def asked(edge: str, question: str, route: str, split: int | None, **more: Any) -> Iterator[HTTPResponse]:
    """The reply of the edge's OpenAI API to a question by one route, greedy."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "isthmus": {"route": route, **({"split": split} if split else {})},
        **more,
    }
    request = urllib.request.Request(
        f"{edge}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            yield response
    except urllib.error.HTTPError as error:
        sys.exit(f"the edge answered {error.code}: {error.read().decode(errors='replace')}")


def ask(edge: str, route: str, split: int | None) -> dict[str, Any]:
    """The whole reply to the question."""
    with asked(edge, QUESTION, route, split) as response:
        reply: dict[str, Any] = json.load(response)
    return reply


def lose_the_cloud(edge: str, split: int, cloud: subprocess.Popen[str]) -> None:
    """Ask by a split, kill the cloud's process in mid-answer, and show how the answer goes on."""
    text, count = "", 0
    how: dict[str, Any] = {}
    with asked(edge, LONG_QUESTION, "split", split, stream=True) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                sys.exit(f"the answer broke off: {chunk['error']['message']}")
            how = chunk.get("isthmus", how)
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                count += 1
            if count == KILLED_AFTER:
                cloud.kill()
                text += " [red]✂[/] "
    console.print("  " + " ".join(text.split()))
    lost, *_, last = how["events"]
    console.print(
        f"  ✂ SIGKILL; token {lost['at_index']} was due next. It came {last['after_s']:.1f} s later: "
        f"{last['event']} to route {how['route']}, no token lost"
    )


def row(reply: dict[str, Any], layers: int) -> list[str]:
    """One line of the table."""
    how = reply["isthmus"]
    timings, link = how["timings"], how["link"]
    answer = " ".join(reply["choices"][0]["message"]["content"].split())
    return [
        how["route"],
        f"{how['split']} + {layers - how['split']}",
        answer,
        f"{timings['ttft_s'] * 1000:.0f} ms",
        f"{timings['decode_tokens_per_s']:.0f}",
        f"{link['bytes_up']:,}",
        f"{link['bytes_down']:,}",
    ]


def empty_table() -> Table:
    """The table's head. K: layers on the edge + layers in the cloud."""
    table = Table("route", "K", Column("answer", ratio=1, overflow="fold"), width=min(console.width, 110))
    for title in ("first", "tok/s", "bytes up", "down"):
        table.add_column(title, justify="right", no_wrap=True)
    return table


def main() -> None:
    tell("pulling the model (once)")
    pulled = command("pull")
    tell("building its pack: quantised weights, one ONNX graph per layer (once)")
    built = command("build")
    layers = int(built["num_layers"])
    console.print(
        f"  {pulled['model']}: {layers} layers, {built['scheme']} ({built['bits']} bits), "
        f"KL to the source weights {built['kl_to_source']:.1e}"
    )
    with ExitStack() as running:
        tell("starting the cloud service (PyTorch) and the edge agent (ONNX Runtime): two processes")
        console.print("  (the cloud's first start finds out which precision is fastest here)")
        cloud, process = running.enter_context(service("cloud", "--port", "0"))
        edge, _ = running.enter_context(service("edge", "--port", "0", "--cloud", cloud))
        console.print(f"  cloud {cloud}   edge {edge}")
        ask_by_each_route(edge, layers)
        tell(f"killing the cloud in the middle of an answer: {LONG_QUESTION}")
        lose_the_cloud(edge, layers // 2, process)
        if sys.stdin.isatty() and sys.stdout.isatty():
            tell("the cloud again, for you")
            running.enter_context(service("cloud", "--port", cloud.rpartition(":")[2]))
        show_the_web_chat(edge)


def ask_by_each_route(edge: str, layers: int) -> None:
    """The same question three times, by route, and once more as the router likes."""
    tell(f"asking by each route: {QUESTION}")
    table = empty_table()
    answers = []
    for route, split in (("local", None), ("split", layers // 2), ("offload", None)):
        reply = ask(edge, route, split)
        answers.append(reply["choices"][0]["message"]["content"])
        table.add_row(*row(reply, layers))
    console.print(table)
    console.print("  K: layers on the edge + layers in the cloud; first: time to the first token")
    if not all("Paris" in answer for answer in answers):
        sys.exit("an answer does not name Paris")
    tell("asking once more, and the router decides")
    how = ask(edge, "auto", None)["isthmus"]
    console.print(f"  {how['decision']['reason']}; it took {how['timings']['total_s']:.2f} s")


def show_the_web_chat(edge: str) -> None:
    """Say where it is, and keep everything running while somebody is there to use it."""
    with urllib.request.urlopen(f"{edge}/", timeout=10) as page:
        if b"<title>Isthmus</title>" not in page.read():
            sys.exit(f"{edge}/ is not the web chat")
    tell(f"now you: the web chat is at {edge}")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    console.print(f"  in a terminal: isthmus chat; any OpenAI client: base_url={edge}/v1. Ctrl-C ends it all")
    sys.stdout.flush()
    while True:
        time.sleep(60)


def leave(number: int, _: object) -> None:
    """On a closed terminal or a polite kill: end as after an error, the services with us."""
    sys.exit(128 + number)


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), leave)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
