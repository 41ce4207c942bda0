"""The floors hold: imports run downwards only, and each floor's third-party imports are a closed list."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {"protocol": 0, "quant": 1, "splitter": 2, "edge": 3, "cloud": 3}
SHARED = {"numpy", "zstandard", "pydantic"}
THIRD_PARTY = {
    "protocol": SHARED,
    "quant": {"numpy"},
    "splitter": SHARED
    | {"onnx_ir", "onnxruntime", "safetensors", "gguf", "tokenizers", "huggingface_hub", "psutil"},
    "edge": SHARED
    | {
        "websockets",
        "starlette",
        "uvicorn",
        "jinja2",
        "prometheus_client",
        "structlog",
        "psutil",
        "llguidance",
    },
    "cloud": SHARED | {"torch", "starlette", "uvicorn", "prometheus_client", "structlog", "psutil"},
}


def imported_modules(source: str) -> list[tuple[int, str]]:
    """Every absolute module that an import statement names, wherever it stands in the file."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append((node.lineno, "<relative>"))
            elif node.module == "isthmus":
                found += [(node.lineno, f"isthmus.{alias.name}") for alias in node.names]
            elif node.module:
                found.append((node.lineno, node.module))
    return found


def violations(floor: str, source: str, name: str) -> list[str]:
    """What `source`, standing on `floor`, imports and must not."""
    bad = []
    for line, module in imported_modules(source):
        top, _, rest = module.partition(".")
        if module == "<relative>":
            bad.append(f"{name}:{line} relative import: write isthmus.{floor}.…")
        elif top == "isthmus":
            target = rest.partition(".")[0]
            if target == "__version__":
                continue
            if target not in FLOORS:
                bad.append(f"{name}:{line} imports {module}, which stands above {floor}")
            elif target != floor and FLOORS[target] >= FLOORS[floor]:
                bad.append(f"{name}:{line} imports {module} upwards or sideways")
        elif top not in sys.stdlib_module_names and top not in THIRD_PARTY[floor]:
            bad.append(f"{name}:{line} imports {top}, which is not on the list of {floor}")
    return bad


@pytest.mark.parametrize("floor", sorted(FLOORS))
def test_floor_imports_downwards_only(floor: str) -> None:
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    bad = [
        line for file in files for line in violations(floor, file.read_text(), str(file.relative_to(ROOT)))
    ]
    assert bad == []


@pytest.mark.parametrize(
    ("floor", "planted"),
    [
        ("protocol", "from isthmus.splitter.spec import ModelSpec"),
        ("protocol", "def f():\n    import isthmus.edge.link"),
        ("quant", "import isthmus.cli"),
        ("splitter", "from isthmus import cloud"),
        ("edge", "from isthmus.cloud.engine import Engine"),
        ("cloud", "import isthmus.edge"),
        ("edge", "import torch"),
        ("edge", "if True:\n    from transformers import AutoModel"),
        ("protocol", "from . import frames"),
        ("cloud", "import onnxruntime"),
    ],
)
def test_a_planted_import_is_caught(floor: str, planted: str) -> None:
    assert violations(floor, planted, "planted.py") != []


def test_the_edge_process_holds_neither_torch_nor_transformers() -> None:
    """Every module of the edge and of the floors below, imported for real in a fresh interpreter."""
    modules = [
        "isthmus." + ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for floor in ("protocol", "quant", "splitter", "edge")
        for file in sorted((ROOT / floor).rglob("*.py"))
    ]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers', 'optimum'}))\n"
        "print(sorted(m for m in sys.modules if m.startswith('isthmus.cloud')))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"]
