"""Every command through a real process: one JSON object, exit codes, errors, the words a person reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import clean_env
from tests.processes import run

pytestmark = pytest.mark.processes


def json_of(*arguments: str, env: dict[str, str], code: int = 0, stdin: str | None = None) -> dict[str, Any]:
    """What `isthmus ARGUMENTS --json` prints: exactly one object on stdout, and the exit code expected."""
    done = run(*arguments, "--json", env=env, stdin=stdin)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def error_of(*arguments: str, env: dict[str, str], code: int, stdin: str | None = None) -> dict[str, str]:
    """The error object of a command that fails with this exit code."""
    result = json_of(*arguments, env=env, code=code, stdin=stdin)
    assert result.keys() == {"error"}
    error: dict[str, str] = result["error"]
    assert error.keys() == {"code", "message", "hint"}
    return error


# ---- models ----------------------------------------------------------------------------------------


def test_pull(model: str, env: dict[str, str]) -> None:
    pulled = json_of("pull", model, env=env)
    assert pulled.keys() == {"model", "path", "sha256", "bytes"}
    assert pulled["model"] == model
    assert pulled["bytes"] > 100_000
    assert len(pulled["sha256"]) == 64


def test_build_show_list_rm(model: str, tmp_path: Path) -> None:
    env = clean_env(tmp_path)
    built = json_of("build", model, "--bits", "8", env=env)
    assert set(built) >= {
        "pack", "model_identity", "num_layers", "bits", "scheme", "weights_bytes", "bytes_per_block",
        "kl_to_source",
    }  # fmt: skip
    assert (built["num_layers"], built["bits"], len(built["bytes_per_block"])) == (4, 8, 6)
    assert Path(built["pack"]).is_relative_to(tmp_path)
    shown = json_of("show", model, env=env)
    assert shown["spec"]["num_layers"] == 4
    assert [pack["scheme"] for pack in shown["packs"]] == [built["scheme"]]
    listed = json_of("list", env=env)
    assert [entry["path"] for entry in listed["models"]] == [built["pack"]]
    assert "smollm2-135m" in [entry["name"] for entry in listed["catalog"]]
    for command in (("show", model), ("list",)):
        said = run(*command, env=env).stdout
        assert built["pack"] in said
    assert json_of("rm", model, env=env) == {"model": model, "removed": [built["pack"]]}
    assert json_of("list", env=env)["models"] == []
    assert "isthmus pull" in run("list", env=env).stdout
    assert error_of("rm", model, env=env, code=1)["code"] == "not_found"
    assert Path(model, "model.safetensors").exists()  # the checkpoint itself is nobody's to remove


def test_build_into_a_folder_and_run_from_it(model: str, env: dict[str, str], tmp_path: Path) -> None:
    built = json_of("build", model, "--bits", "32", "--out", str(tmp_path / "pack"), env=env)
    assert built["pack"] == str(tmp_path / "pack")
    answer = json_of("run", "hello", "--model", built["pack"], "--max-tokens", "2", env=env)
    assert len(answer["token_ids"]) == 2


# ---- run -------------------------------------------------------------------------------------------


def answer_to(prompt: str, *arguments: str, model: str, env: dict[str, str], **more: Any) -> dict[str, Any]:
    return json_of(
        "run", prompt, "--model", model, "--bits", "8", "--temperature", "0", *arguments, env=env, **more
    )


def test_run(model: str, env: dict[str, str]) -> None:
    answer = answer_to("hello", "--max-tokens", "5", model=model, env=env)
    assert set(answer) >= {
        "text", "token_ids", "prompt_tokens", "finish_reason", "route", "split", "shape", "decision",
        "timings", "link", "events",
    }  # fmt: skip
    assert (answer["route"], answer["split"], answer["finish_reason"]) == ("local", 4, "length")
    assert len(answer["token_ids"]) == 5
    assert answer["timings"].keys() == {"ttft_s", "decode_tokens_per_s", "total_s"}
    assert answer["link"].keys() == {"rtt_s", "bytes_up", "bytes_down"}
    assert answer["decision"]["reason"]


def test_run_for_people(model: str, env: dict[str, str]) -> None:
    arguments = ("--model", model, "--bits", "8", "--temperature", "0", "--max-tokens", "5")
    done = run("run", "hello", *arguments, "--explain", env=env)
    assert done.returncode == 0
    # Written as bytes by the process, read as text here: what it printed is the text and one newline.
    assert done.stdout == answer_to("hello", "--max-tokens", "5", model=model, env=env)["text"] + "\n"
    assert "local (all layers here) · 5 tokens, as many as were allowed" in done.stderr
    assert "offload" in done.stderr
    assert "no cloud is configured" in done.stderr


def test_run_reads_standard_input(model: str, env: dict[str, str]) -> None:
    few = ("--max-tokens", "3")
    read = answer_to("-", *few, model=model, env=env, stdin="hello\n")
    assert read["text"] == answer_to("hello", *few, model=model, env=env)["text"]
    assert (
        answer_to("-", *few, model=model, env=env, stdin="hello\n\n")["prompt_tokens"] > read["prompt_tokens"]
    )


def test_run_raw_leaves_the_chat_template_out(model: str, env: dict[str, str]) -> None:
    few = ("--max-tokens", "3")
    raw = answer_to("hello", "--raw", *few, model=model, env=env)
    assert raw["prompt_tokens"] == 1
    assert answer_to("hello", *few, model=model, env=env)["prompt_tokens"] > 10


def test_run_with_a_seed_repeats(model: str, env: dict[str, str]) -> None:
    texts = [
        answer_to("hello", "--temperature", "1", "--seed", seed, "--max-tokens", "8", model=model, env=env)[
            "text"
        ]
        for seed in ("3", "3", "4")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_default_limit_gives_way_to_the_context(model: str, env: dict[str, str]) -> None:
    """256 tokens were nobody's wish: a prompt that leaves room for fewer is answered with fewer."""
    prompt = "x" * 4000
    answer = answer_to(prompt, model=model, env=env)
    assert answer["prompt_tokens"] + len(answer["token_ids"]) == 4096
    error = error_of("run", prompt, "--model", model, "--bits", "8", "--max-tokens", "256", env=env, code=2)
    assert error["code"] == "context_overflow"
    assert "4096" in error["message"]


def test_a_split_that_is_set_forbids_no_other_route(model: str, env: dict[str, str]) -> None:
    answer = answer_to(
        "hello", "--route", "local", "--max-tokens", "1", model=model, env={**env, "ISTHMUS_SPLIT": "2"}
    )
    assert answer["route"] == "local"


def test_run_leaves_no_torch_in_the_process(model: str, env: dict[str, str]) -> None:
    script = (
        "import sys; sys.argv[0] = 'isthmus'\n"
        "from isthmus.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'torch', 'transformers', 'onnx_ir'}))"
    )
    arguments = ["run", "hello", "--model", model, "--bits", "8", "--max-tokens", "2"]
    answer_to(
        "hello", "--max-tokens", "1", model=model, env=env
    )  # the pack is there: running is all that's left
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# ---- chat, without a terminal ------------------------------------------------------------------------


def test_chat_reads_lines_and_tells_all_at_the_end(model: str, env: dict[str, str]) -> None:
    arguments = ("chat", "--model", model, "--bits", "8", "--temperature", "0", "--max-tokens", "4")
    talk = json_of(*arguments, env=env, stdin="hello\n/route local\nthe hello\n")
    assert [message["role"] for message in talk["messages"]] == ["user", "assistant", "user", "assistant"]
    assert [message["content"] for message in talk["messages"][::2]] == ["hello", "the hello"]
    assert [turn["route"] for turn in talk["turns"]] == ["local", "local"]
    assert talk["turns"][1]["counts"]["edge_cached_rows"] > 0


def test_chat_goes_on_after_an_error_and_exits_with_1(model: str, env: dict[str, str]) -> None:
    arguments = ("chat", "--model", model, "--bits", "8", "--max-tokens", "2")
    talk = json_of(*arguments, env=env, stdin="/route offload\nhello\n/route local\nhello\n/quit\n", code=1)
    assert [set(turn) == {"error"} for turn in talk["turns"]] == [True, False]
    assert talk["turns"][0]["error"]["code"] == "route_infeasible"
    assert len(talk["messages"]) == 2


# ---- settings ----------------------------------------------------------------------------------------


def test_config(tmp_path: Path) -> None:
    env = clean_env(tmp_path)
    where = json_of("config", "path", env=env)
    assert where == {"path": str(tmp_path / "config" / "isthmus" / "config.toml"), "exists": False}
    assert run("config", "path", env=env).stdout.strip() == where["path"]
    assert json_of("config", "set", "parallel", "3", env=env)["value"] == 3
    shown = json_of("config", "show", env={**env, "ISTHMUS_QUEUE": "5"})
    assert shown["settings"]["parallel"] == {"value": 3, "origin": where["path"]}
    assert shown["settings"]["queue"] == {"value": 5, "origin": "ISTHMUS_QUEUE"}
    assert shown["settings"]["model"]["origin"] == "default"
    assert "ISTHMUS_QUEUE" in run("config", "show", env={**env, "ISTHMUS_QUEUE": "5"}).stdout
    assert error_of("config", "set", "paralel", "3", env=env, code=2)["code"] == "bad_setting"


def test_a_key_is_stored_for_its_owner_alone_and_never_shown(tmp_path: Path) -> None:
    env = clean_env(tmp_path)
    said = [run("config", "set", "api_key", "hunter2", env=env), run("config", "show", env=env)]
    said.append(run("config", "show", "--json", env=env))
    assert not any("hunter2" in done.stdout + done.stderr for done in said)
    path = Path(json_of("config", "path", env=env)["path"])
    assert "hunter2" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_a_setting_reaches_the_command(model: str, env: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"model = {json.dumps(model)}\nbits = '8'\nmax_tokens = 2\n")
    answer = json_of("run", "hello", env={**env, "ISTHMUS_CONFIG": str(config)})
    assert len(answer["token_ids"]) == 2


# ---- bench -------------------------------------------------------------------------------------------


def test_bench_local(model: str, env: dict[str, str]) -> None:
    small = ("--bits", "8", "--rounds", "2", "--prompt-tokens", "8", "--output-tokens", "4")
    report = json_of("bench", "local", "--model", model, *small, env=env)
    assert report.keys() == {"bench", "machine", "figures", "rows", "notes"}
    assert report["bench"] == "local"
    assert report["machine"].keys() == {"cpu", "cores", "gpu"}
    for name in (
        "prefill_tokens_per_s", "decode_tokens_per_s", "blockwise_over_single_prefill",
        "blockwise_over_single_decode",
    ):  # fmt: skip
        assert report["figures"][name] > 0
    said = run("bench", "local", "--model", model, *small, env=env)
    assert said.returncode == 0
    assert "blockwise_over_single_decode" in said.stdout


# ---- wrong usage and failures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "error", "said"),
    [
        (("run",), 2, "usage", "PROMPT"),
        (("frobnicate",), 2, "usage", "frobnicate"),
        (("run", "x", "--frobnicate"), 2, "usage", "--frobnicate"),
        (("run", "x", "--max-tokens", "many"), 2, "usage", "--max-tokens"),
        (("run", "x", "--max-tokens", "0"), 2, "usage", "--max-tokens"),
        (("run", "x", "--seed", "-1"), 2, "usage", "--seed"),
        (("run", "x", "--route", "fast"), 2, "bad_setting", "fast"),
        (("run", "x", "--bits", "5"), 2, "bad_setting", "5"),
        (("serve", "edge", "--port", "70000"), 2, "usage", "--port"),
        (("serve", "edge", "--host", "0.0.0.0"), 2, "insecure_bind", "0.0.0.0"),
        (("relay", "nowhere", "127.0.0.1:1"), 2, "bad_setting", "nowhere"),
        (("bench", "split", "--rtt-ms", "soon"), 2, "bad_setting", "soon"),
        (("run", "x", "--model", "smollm"), 1, "not_found", "smollm"),
        (("show", "./no/such/folder"), 1, "not_found", "no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_errors(arguments: tuple[str, ...], code: int, error: str, said: str, env: dict[str, str]) -> None:
    told = error_of(*arguments, env=env, code=code)
    assert told["code"] == error
    assert said in told["message"]
    assert told["hint"]


def test_an_error_is_one_readable_line_without_json(env: dict[str, str]) -> None:
    done = run("run", "x", "--route", "fast", env=env)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error (bad_setting): --route: route = 'fast'", "  one of auto, local, split, offload"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--temperature", "nan"), "usage"),
        (("--route", "offload"), "route_infeasible"),
        (("--split", "9", "--cloud", "ws://127.0.0.1:1"), "bad_split"),
        (("--route", "offload", "--cloud", "ws://127.0.0.1:1"), "cloud_unreachable"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_requests_that_cannot_be(
    arguments: tuple[str, ...], error: str, model: str, env: dict[str, str]
) -> None:
    done = run("run", "x", "--model", model, "--bits", "8", *arguments, "--json", env=env)
    assert json.loads(done.stdout)["error"]["code"] == error
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr


def test_standard_input_that_is_no_text(model: str, env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "isthmus", "run", "-", "--model", model, "--json"]
    done = subprocess.run(command, capture_output=True, input=b"a\xff", env=env, timeout=60, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "invalid_utf8"


def test_a_cache_that_cannot_be_written(model: str, env: dict[str, str]) -> None:
    error = error_of("run", "x", "--model", model, env={**env, "ISTHMUS_CACHE": "/dev/null/cache"}, code=1)
    assert "/dev/null/cache" in error["message"]


def test_a_reader_who_has_gone_is_no_drama(env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "isthmus", "list"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_help_and_version(env: dict[str, str]) -> None:
    alone = run(env=env)
    assert alone.returncode == 2
    assert alone.stderr == ""
    said = run("--help", env=env)
    assert said.returncode == 0
    for command in (
        "pull",
        "build",
        "list",
        "show",
        "rm",
        "run",
        "chat",
        "serve",
        "relay",
        "bench",
        "config",
    ):
        assert f" {command} " in said.stdout
    assert run("--version", env=env).stdout.startswith("isthmus 0.")
