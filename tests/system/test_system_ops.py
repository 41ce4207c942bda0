"""The files for operating it: they pass their linters, and what they run is run here, without containers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from isthmus.edge.agent import Agent
from tests.cli.conftest import clean_env
from tests.packs import pack_checkpoint
from tests.tiny import make_tiny

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "demos" / "ops"
TOOLS = Path(sys.executable).parent


def read_yaml(path: Path) -> dict[str, Any]:
    with path.open() as file:
        content: dict[str, Any] = YAML(typ="safe").load(file)
    return content


COMPOSE = read_yaml(OPS / "compose.yaml")


# ---- linters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
        ["hadolint", "--failure-threshold", "info", "Dockerfile.cloud"],
        ["hadolint", "--failure-threshold", "info", "Dockerfile.edge"],
    ],
    ids=lambda command: command[-1],
)
def test_linters_have_nothing_to_say(command: list[str]) -> None:
    done = subprocess.run([TOOLS / command[0], *command[1:]], capture_output=True, text=True, cwd=OPS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_images_get_all_that_the_wheel_is_made_of() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied = re.findall(
        r"^COPY (?!--)(\S+) /", "".join(file.read_text() for file in OPS.glob("Dockerfile.*")), re.M
    )
    needed = [*wheel["only-include"], "pyproject.toml", "README.md", "LICENSE", *copied]
    assert len(copied) >= 3
    for path in needed:
        assert any(Path(path).is_relative_to(one) for one in allowed), path


def test_everything_that_is_mounted_is_declared() -> None:
    """Secrets, volumes, networks and configs that services name; files that lie beside the compose file."""
    for name, service in COMPOSE["services"].items():
        assert set(service.get("secrets", [])) <= COMPOSE["secrets"].keys(), name
        assert set(service["networks"]) <= COMPOSE["networks"].keys(), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (OPS / source).is_file(), volume
        for config in service.get("configs", []):
            assert config["source"] in COMPOSE["configs"]
        if "build" in service:
            assert (OPS / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "an image without a version"


# ---- services, without containers ----------------------------------------------------------------------


@dataclass
class Host:
    """This machine in the place of the containers: their paths, names and ports as they are here."""

    folder: Path
    env: dict[str, str]
    ports: dict[int, int]

    def here(self, text: str) -> str:
        """A word of a command line of compose.yaml as it is meant here."""
        text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: self.env.get(m[1], m[2]), text)
        text = text.replace("/run/secrets", str(self.folder / "secrets"))
        text = text.replace("/opt/isthmus/healthcheck.py", str(OPS / "healthcheck.py"))
        text = text.replace("//cloud:", "//localhost:").replace("0.0.0.0", "127.0.0.1")
        for inside, outside in self.ports.items():
            text = re.sub(rf"\b{inside}\b", str(outside), text)
        return text

    def healthy(self, service: str) -> bool:
        """What the container's health check says."""
        kind, python, *rest = COMPOSE["services"][service]["healthcheck"]["test"]
        assert kind == "CMD"
        assert python.startswith("python")
        words = [sys.executable, *map(self.here, rest)]
        return subprocess.run(words, env=self.env, stderr=subprocess.DEVNULL, timeout=20).returncode == 0

    @contextmanager
    def running(self, command: list[str]) -> Iterator[subprocess.Popen[str]]:
        """`isthmus COMMAND`; drained by SIGTERM at the end, with exit code 0."""
        log = (self.folder / f"{command[1]}.log").open("w+")
        process = subprocess.Popen(
            [sys.executable, "-m", "isthmus", *command],
            stdout=subprocess.PIPE, stderr=log, text=True, env=self.env,
        )  # fmt: skip
        assert process.stdout is not None
        with process.stdout, log:
            try:
                yield process
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
            finally:
                process.kill()
                process.wait()

    def log_of(self, command: str) -> list[dict[str, Any]]:
        """Its events; besides, stderr has lines about what is fetched and built before."""
        lines = (self.folder / f"{command}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tmp_path_factory.mktemp("ops")
    model = make_tiny("llama", folder / "tiny", max_position_embeddings=512)
    made = clean_env(folder) | {
        "ISTHMUS_MODEL": str(model),
        "ISTHMUS_PRECISION": "fp32",  # nothing has to be measured then
        "ISTHMUS_PROFILE": "none",
        "ISTHMUS_BITS": "32",
        "ISTHMUS_LOG_FORMAT": "json",
        "ISTHMUS_STATE": str(folder / "state"),
        "ISTHMUS_DATA": str(folder / "data"),
    }
    return Host(folder, made, {8077: free_port(), 8078: free_port()})


@pytest.fixture(scope="module")
def secrets(host: Host) -> Path:
    """Made by the lines at the top of the compose file."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    lines = [line[4:] for line in (OPS / "compose.yaml").read_text().splitlines() if line.startswith("#   ")]
    script = "\n".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("docker"))])
    assert script.count("isthmus key") == 3
    env = {**host.env, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], cwd=host.folder, env=env, check=True, capture_output=True)
    made = host.folder / "secrets"
    assert made.stat().st_mode & 0o77 == 0
    assert [one for one in COMPOSE["secrets"] if not (made / one).is_file()] == []
    return made


@dataclass
class Together:
    """What edge and cloud, started as the compose file says, have done: each service's health before and at
    work, the reply to a request by offload, the metrics of Prometheus' jobs."""

    healthy: dict[str, tuple[bool, bool]]
    unkeyed_status: int
    reply: httpx.Response
    scrapes: dict[str, str]


@pytest.fixture(scope="module")
def together(host: Host, secrets: Path) -> Together:
    services = COMPOSE["services"]
    commands = {name: [host.here(word) for word in services[name]["command"]] for name in ("cloud", "edge")}
    before = {name: host.healthy(name) for name in commands}
    with host.running(commands["cloud"]) as cloud, host.running(commands["edge"]) as edge:
        assert edge.stdout is not None
        assert cloud.stdout is not None
        url = edge.stdout.readline().split()[-1].replace("127.0.0.1", "localhost")
        assert cloud.stdout.readline().startswith("ready cloud wss://")
        healthy = {name: (before[name], host.healthy(name)) for name in commands}
        with httpx.Client(verify=ssl.create_default_context(cafile=secrets / "ca.pem"), timeout=60) as http:
            body = {"prompt": "hello", "max_tokens": 4, "isthmus": {"route": "offload"}}
            key = {"authorization": f"Bearer {(secrets / 'me.key').read_text().strip()}"}
            unkeyed = http.get(f"{url}/metrics").status_code
            reply = http.post(f"{url}/v1/completions", json=body, headers=key)
            jobs = read_yaml(OPS / "prometheus.yml")["scrape_configs"]
            scrapes = {job["job_name"]: scraped(http, host, job) for job in jobs}
    return Together(healthy, unkeyed, reply, scrapes)


def scraped(http: httpx.Client, host: Host, job: dict[str, Any]) -> str:
    """What Prometheus gets from this job's target."""
    headers = {}
    if "authorization" in job:
        file = Path(host.here(job["authorization"]["credentials_file"]))
        headers["authorization"] = f"Bearer {file.read_text().strip()}"
    name, port = job["static_configs"][0]["targets"][0].split(":")
    assert name in COMPOSE["services"]
    reply = http.get(f"{job['scheme']}://localhost:{host.ports[int(port)]}/metrics", headers=headers)
    assert reply.status_code == 200
    return reply.text


@pytest.mark.processes
def test_the_services_of_compose_work_together(together: Together, host: Host) -> None:
    """Both start, are healthy, serve a request together, and end by SIGTERM with 0 (see `running`)."""
    assert COMPOSE["services"]["cloud"]["command"] == COMPOSE["services"]["cloud-cpu"]["command"]
    assert together.healthy == {"cloud": (False, True), "edge": (False, True)}
    assert together.unkeyed_status == 401
    assert together.reply.status_code == 200, together.reply.text
    request_id = together.reply.json()["isthmus"]["request_id"]
    logs = {kind: host.log_of(kind) for kind in ("edge", "cloud")}
    told = {
        kind: [line["event"] for line in log if line.get("request_id") == request_id]
        for kind, log in logs.items()
    }
    assert told == {"edge": ["request"], "cloud": ["session_open", "session_end"]}
    for kind, expected in (
        ("edge", ["serving", "link_up", "request", "draining", "stopped"]),
        ("cloud", ["model_loaded", "edge_connected", "session_open", "session_end", "draining", "drained"]),
    ):
        events = [line["event"] for line in logs[kind] if line["event"] in expected]
        assert events == expected


@pytest.mark.processes
def test_the_unit_of_systemd(host: Host) -> None:
    """Its command serves, and SIGTERM ends it; systemd itself has nothing to say where it is installed."""
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(OPS / "isthmus-edge.service")
    assert unit["Service"]["KillSignal"] == "SIGTERM"
    binary, *words = shlex.split(unit["Service"]["ExecStart"])
    assert binary == "%h/.local/bin/isthmus"
    if shutil.which("systemd-analyze"):
        there = host.folder / ".local" / "bin" / "isthmus"
        there.parent.mkdir(parents=True)
        there.symlink_to(TOOLS / "isthmus")
        verify = ["systemd-analyze", "--user", "verify", str(OPS / "isthmus-edge.service")]
        env = {**os.environ, "HOME": str(host.folder), "XDG_RUNTIME_DIR": str(host.folder)}
        done = subprocess.run(verify, capture_output=True, text=True, env=env)
        assert (done.returncode, done.stderr) == (0, "")
    with host.running([*words, "--port", "0"]) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        assert httpx.get(f"{url}/readyz").status_code == 200
    assert host.log_of("edge")[-1]["event"] == "stopped"


# ---- figures -----------------------------------------------------------------------------------------


def test_dashboard_and_metrics_agree(together: Together, host: Host) -> None:
    """Each metric that a panel asks for is exposed; each panel asks one of the two jobs."""
    agent = Agent(pack_checkpoint(host.folder / "tiny", host.folder / "pack"))
    agent.routing.energy_j = 1.0  # known on devices that tell their power
    texts = [*together.scrapes.values(), agent.telemetry.render().decode()]
    exposed = {
        name for text in texts for family in text_string_to_metric_families(text) for name in names_of(family)
    }
    dashboard = json.loads((OPS / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(r"\bisthmus_\w+", query)}
    assert len(asked) > 30
    assert asked <= exposed, asked - exposed
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for query in queries:
        assert query.count("(") == query.count(")"), query
        assert re.search(r'job=~"\$(edge|cloud)"', query), query
    variables = {one["name"]: one["query"] for one in dashboard["templating"]["list"]}
    assert together.scrapes.keys() == {variables["edge"], variables["cloud"]}


def names_of(family: Metric) -> list[str]:
    """What queries may call it, whether or not it has samples yet."""
    endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
    return [family.name + ending for ending in endings]
