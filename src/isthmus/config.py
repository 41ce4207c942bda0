"""Settings: flag > `ISTHMUS_*` environment > config.toml (XDG) > default, each with its origin."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.protocol.errors import ConfigError

Value = str | int | float | bool | list[str] | None
Kind = Literal["str", "int", "float", "list"]


@dataclass(frozen=True)
class Setting:
    """One setting: its name in config.toml (the flag is `--name-with-dashes`), type, default, meaning."""

    name: str
    kind: Kind
    default: Value
    help: str
    choices: tuple[str, ...] = ()
    secret: bool = False
    least: float | None = None

    @property
    def env(self) -> str:
        return f"ISTHMUS_{self.name.upper()}"

    def shown(self, value: Value) -> Value:
        """The value, unless it is a secret: then only that there is one."""
        return "(set)" if self.secret and value else value


LOG_FORMATS = ("auto", "json", "tty")
LOG_LEVELS = ("debug", "info", "warning", "error")
SETTINGS: tuple[Setting, ...] = (
    Setting(
        "model", "str", "smollm2-135m", "catalog name, hub repository, folder, .gguf file or pack folder"
    ),
    Setting("bits", "str", "auto", "weight precision of the pack", ("auto", "4", "8", "32")),
    Setting("cloud", "list", None, "cloud URLs (ws:// or wss://), tried in order"),
    Setting("pull_from_cloud", "str", "off", "take the model's blocks from the cloud", ("on", "off")),
    Setting("api_key", "str", None, "key for the cloud", secret=True),
    Setting("api_key_file", "str", None, "file with the key (edge) or `label:key` lines (cloud)"),
    Setting("serve_key_file", "str", None, "file of `label:key` lines: who may use the edge's API"),
    Setting("tls_ca", "str", None, "PEM file with the only certificates to trust for clouds; own CA"),
    Setting("tls_client_cert", "str", None, "PEM file with the certificate that the edge shows clouds"),
    Setting("tls_client_key", "str", None, "PEM file with the key of tls_client_cert"),
    Setting("route", "str", "auto", "route of a request", ("auto", "local", "split", "offload")),
    Setting("split", "int", None, "number of layers on the edge", least=0),
    Setting(
        "shape", "str", None, "who samples in a split: the cloud (prefix) or the edge (u)", ("prefix", "u")
    ),
    Setting("codec", "str", None, "format of boundary rows on the wire", ("f32", "bf16", "int8o")),
    Setting(
        "fallback", "str", "any", "where a request may go on whose cloud is lost", ("any", "cloud", "none")
    ),
    Setting("reconnect_s", "float", 10.0, "seconds to try to reach a lost cloud again", least=0),
    Setting("cache_mb", "int", 512, "memory for the KV of conversations that may go on", least=0),
    Setting("history_mb", "int", 64, "memory for sent rows, kept for a lost cloud", least=0),
    Setting("provider", "str", "cpu", "ONNX Runtime execution provider of the edge"),
    Setting(
        "threads",
        "int",
        None,
        "compute threads; none given = the physical cores allowed to this process",
        least=1,
    ),
    Setting("memory_mb", "int", None, "most memory the edge's weights and KV may take", least=1),
    Setting("min_depth", "int", 1, "fewest layers the edge keeps when it splits", least=1),
    Setting("parallel", "int", 1, "requests the edge serves at once", least=1),
    Setting("queue", "int", 64, "requests that may wait on the edge before it answers 429", least=0),
    Setting("device", "str", "auto", "where the cloud computes", ("auto", "cpu", "cuda")),
    Setting("precision", "str", "auto", "weights of the cloud", ("auto", "fp32", "bf16", "int8", "int4")),
    Setting("policy", "str", "mlfq", "whose turn it is in the cloud", ("fcfs", "mlfq")),
    Setting(
        "kv_mb", "int", None, "memory for the cloud's KV pages; none given = a few full contexts", least=1
    ),
    Setting(
        "offer_pack",
        "str",
        "auto",
        "let edges fetch the model's pack from the cloud: on builds it, auto needs a built one",
        ("auto", "on", "off"),
    ),
    Setting("alternative", "str", None, "cloud URL that edges are sent to when this cloud shuts down"),
    Setting("preemption_notice", "str", None, "file or URL that tells a spot machine that it will be taken"),
    Setting("detached_s", "float", None, "seconds a session without connection is kept; 0 = not", least=0),
    Setting("tenant_sessions", "int", None, "most sessions of one tenant", least=1),
    Setting("tenant_kv_mb", "int", None, "most KV memory of one tenant", least=1),
    Setting("tenant_tokens_per_s", "float", None, "tokens per second of one tenant; 0 = no limit", least=0),
    Setting("tenant_resumes_per_min", "int", None, "resumes per minute of one tenant; 0 = no limit", least=0),
    Setting("price_input_per_mtok", "float", None, "what the cloud charges for a million tokens in", least=0),
    Setting(
        "price_output_per_mtok", "float", None, "what the cloud charges for a million tokens out", least=0
    ),
    Setting("gpu_usd_per_h", "float", None, "what the cloud's machine costs in an hour, US dollars", least=0),
    Setting("utilisation", "float", None, "share of that hour in which it computes, up to 1", least=0),
    Setting("egress_usd_per_gb", "float", None, "what a gigabyte that leaves the cloud costs", least=0),
    Setting("prices_dated", "str", None, "since when the cloud's prices hold; none given = today"),
    Setting("max_tokens", "int", 256, "most tokens to generate", least=1),
    Setting("temperature", "float", None, "0 = greedy; none given = what the model's makers advise", least=0),
    Setting("slo_ttft_s", "float", None, "seconds in which the first token should come", least=1e-3),
    Setting("slo_tokens_per_s", "float", None, "how fast the tokens after it should come", least=1e-3),
    Setting("max_cost_usd", "float", None, "what one request may cost at most", least=0),
    Setting("budget_usd", "float", None, "what all requests of one process may cost", least=0),
    Setting("value_of_time_usd_per_h", "float", 3.6, "what an hour of waiting for answers is worth", least=0),
    Setting(
        "usd_per_kj_low_battery", "float", 0.05, "what a kilojoule of an empty battery is worth", least=0
    ),
    Setting("slo_miss_usd", "float", 0.02, "what it costs to miss slo_ttft_s or slo_tokens_per_s", least=0),
    Setting(
        "quality_usd_per_nat", "float", 1e-4, "what a nat of KL to the source weights costs, a token", least=0
    ),
    Setting(
        "hysteresis", "float", 0.05, "how much better a way must be to leave the one taken last", least=0
    ),
    Setting("conversations", "str", "on", "keep the web chat's conversations on this device", ("on", "off")),
    Setting("chat_history", "str", "on", "keep what is typed in `isthmus chat`", ("on", "off")),
    Setting(
        "log_format", "str", "auto", "how `serve` logs; auto: JSON unless stderr is a terminal", LOG_FORMATS
    ),
    Setting("log_level", "str", "info", "from which level on `serve` logs", LOG_LEVELS),
    Setting("decision_log", "str", None, "file that gets every routing decision, without content"),
    Setting("profile", "str", "auto", "what this device can do: a file, an example's name, auto or none"),
    Setting("idle_watts", "float", None, "declared power of this device at rest", least=0),
    Setting("active_watts", "float", None, "declared power of this device while it computes", least=0),
    Setting("radio", "str", "none", "by what the edge sends: joules per byte", ("none", "wifi", "lte")),
    Setting("data_usd_per_gb", "float", 0.0, "what the edge pays for a gigabyte sent or received", least=0),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Resolved:
    """A value and where it came from: `flag`, the environment variable, the file, or `default`."""

    value: Value
    origin: str


def config_path(env: Mapping[str, str] | None = None) -> Path:
    """$ISTHMUS_CONFIG, or config.toml under $XDG_CONFIG_HOME/isthmus (default ~/.config/isthmus)."""
    env = os.environ if env is None else env
    if explicit := env.get("ISTHMUS_CONFIG"):
        return Path(explicit)
    base = env.get("XDG_CONFIG_HOME") or str(Path(env.get("HOME") or Path.home()) / ".config")
    return Path(base) / "isthmus" / "config.toml"


def state_path(env: Mapping[str, str] | None = None) -> Path:
    """What is kept between runs and may be lost: $ISTHMUS_STATE, or isthmus under $XDG_STATE_HOME (default
    ~/.local/state)."""
    return _folder(os.environ if env is None else env, "STATE", ".local/state")


def data_path(env: Mapping[str, str] | None = None) -> Path:
    """What is kept until somebody deletes it: $ISTHMUS_DATA, or isthmus under $XDG_DATA_HOME (default
    ~/.local/share)."""
    return _folder(os.environ if env is None else env, "DATA", ".local/share")


def _folder(env: Mapping[str, str], kind: str, default: str) -> Path:
    """As the XDG Base Directory Specification has it, below `default` of the home where nothing is said."""
    if explicit := env.get(f"ISTHMUS_{kind}"):
        return Path(explicit).expanduser()
    base = env.get(f"XDG_{kind}_HOME")
    return (Path(base) if base else Path(env.get("HOME") or Path.home()) / default) / "isthmus"


def read_file(path: Path) -> dict[str, Value]:
    """The settings in `path`, checked; {} when there is no such file."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}", hint="mend the file, or move it away") from error
    return {name: parse(lookup(name, str(path)), value, str(path)) for name, value in raw.items()}


def lookup(name: str, origin: str) -> Setting:
    """The setting called `name`, or a ConfigError naming those that exist."""
    if name not in BY_NAME:
        raise ConfigError(
            f"{origin}: there is no setting {name!r}", hint=f"settings: {', '.join(sorted(BY_NAME))}"
        )
    return BY_NAME[name]


def parse(setting: Setting, raw: object, origin: str) -> Value:
    """`raw` (text from a flag, the environment or `config set`; or a TOML value) as the setting's type."""
    try:
        value: Value
        match setting.kind:
            case "list":
                value = (
                    [v.strip() for v in raw.split(",") if v.strip()]
                    if isinstance(raw, str)
                    else _strings(raw)
                )
            case "int":
                if isinstance(raw, bool | float):
                    raise ValueError
                value = int(str(raw))
            case "float":
                if isinstance(raw, bool):
                    raise ValueError
                value = float(str(raw))
                if not math.isfinite(value):
                    raise ValueError
            case "str":
                value = str(raw)
    except ValueError:
        raise ConfigError(
            f"{origin}: {setting.name} = {raw!r} is not of type {setting.kind}", hint=setting.help
        ) from None
    if setting.choices and value not in setting.choices:
        raise ConfigError(f"{origin}: {setting.name} = {raw!r}", hint=f"one of {', '.join(setting.choices)}")
    if setting.least is not None and isinstance(value, int | float) and value < setting.least:
        raise ConfigError(
            f"{origin}: {setting.name} = {raw!r}, at least {setting.least:g} is needed", hint=setting.help
        )
    return value


def _strings(raw: object) -> list[str]:
    if isinstance(raw, list | tuple) and all(isinstance(item, str) for item in raw):
        return list(raw)
    raise ValueError


class Settings:
    """Resolves settings for one command; flags are given by name, None meaning "not given".

    Raises ConfigError for any flag, variable or line of the file that is wrong, before the command does
    anything that takes long.
    """

    def __init__(
        self, flags: Mapping[str, object] | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.env = os.environ if env is None else env
        self.flags = {name: value for name, value in (flags or {}).items() if value not in (None, [], ())}
        self.path = config_path(self.env)
        self.file = read_file(self.path)
        for name in BY_NAME:
            self.resolve(name)

    def resolve(self, name: str) -> Resolved:
        setting = BY_NAME[name]
        if name in self.flags:
            flag = f"--{name.replace('_', '-')}"
            return Resolved(parse(setting, self.flags[name], flag), "flag")
        if raw := self.env.get(setting.env):
            return Resolved(parse(setting, raw, setting.env), setting.env)
        if name in self.file:
            return Resolved(self.file[name], str(self.path))
        return Resolved(setting.default, "default")

    def text(self, name: str) -> str | None:
        value = self.resolve(name).value
        return None if value is None else str(value)

    def number(self, name: str) -> int | None:
        value = self.resolve(name).value
        return None if value is None else int(str(value))

    def real(self, name: str) -> float | None:
        value = self.resolve(name).value
        return None if value is None else float(str(value))

    def texts(self, name: str) -> list[str]:
        value = self.resolve(name).value
        return list(value) if isinstance(value, list) else []

    def show(self) -> dict[str, dict[str, Value]]:
        """Every setting as {"value", "origin"}; secrets are shown only as being set."""
        shown: dict[str, dict[str, Value]] = {}
        for setting in SETTINGS:
            resolved = self.resolve(setting.name)
            shown[setting.name] = {"value": setting.shown(resolved.value), "origin": resolved.origin}
        return shown


def write_setting(path: Path, name: str, raw: str) -> Value:
    """Store one setting in `path` (created if needed) and return its parsed value."""
    value = parse(lookup(name, "config set"), raw, "config set")
    current = read_file(path) | {name: value}
    lines = [f"{key} = {_toml(item)}" for key, item in sorted(current.items()) if item is not None]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.touch(mode=0o600)  # it may hold a key
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", hint="set ISTHMUS_CONFIG to a file you may write"
        ) from error
    return value


def _toml(value: Value) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else {"\\": "\\\\", '"': '\\"'}.get(c, c)
            for c in value
        )
        return f'"{escaped}"'
    return str(value)
