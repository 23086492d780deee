"""The documentation is true: its code runs, its commands parse, its messages exist, its generated pages are up to date."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

from scalefold.compiler import CompileReport
from scalefold.compiler.calibrate import default_texts
from scalefold.compiler.cli import app

Cli = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
HOWTOS = sorted((DOCS / "howto").glob("*.md"))
FENCE = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(\w+)(?: title=\"(.+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A piece of code on a page; `sh` and `python` are run, `bash` only has to parse."""

    language: str
    title: str
    code: str
    run: bool


def fences(page: Path) -> list[Fence]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Fence(match[2], match[3] or "", match[4], match[1] is None) for match in found]


def commands(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.split("#")[0].strip()]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "scripts" / "build_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_generated_pages_are_those_of_the_source() -> None:
    made: dict[Path, str] = generator().pages()
    assert {path.name for path in made if path.parent.name == "passes"} == {
        path.name for path in (DOCS / "passes").glob("*.md")
    }
    stale = [str(path) for path, text in made.items() if (DOCS / path).read_text(encoding="utf-8") != text]
    assert stale == [], "scripts/build_docs.py writes them anew"


def test_every_pass_has_a_page() -> None:
    modules = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert {path.stem.replace("-", "_") for path in (DOCS / "passes").glob("*.md")} - {"index"} == modules


def nav(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from nav(value) if isinstance(value, list) else [value]


def test_the_site_shows_every_page_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(nav(config["nav"])) == sorted(str(path.relative_to(DOCS)) for path in PAGES)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = [fence.code for fence in fences(DOCS / "tour.md")]
    assert len(code) > 8
    exec("\n".join(code), {"__name__": "tour"})


@pytest.fixture
def folders(float_model: Path, compiled: dict[str, CompileReport], tmp_path: Path) -> Path:
    """What the how-tos start from: a float model, two compiled folders, some text."""
    shutil.copytree(float_model.parent, tmp_path / "float")
    for name, target in (("out", "onnxruntime-cpu"), ("out-qdq", "qdq")):
        source = compiled[target].output
        assert source is not None
        shutil.copytree(source, tmp_path / name)
    texts = [" ".join(text.split()[:12]) for text in default_texts()[:48]]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    return tmp_path


def run_line(words: list[str], folder: Path, cli: Cli) -> None:
    if words[0] == "scalefold":
        done = cli(*words[1:])
    else:
        done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", HOWTOS, ids=lambda path: path.stem)
def test_a_how_to_works_as_it_says(page: Path, folders: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    namespace: dict[str, Any] = {"__name__": "howto"}
    ran = 0
    for fence in fences(page):
        if fence.title:
            (folders / fence.title).write_text(fence.code, encoding="utf-8")
        elif fence.language == "python" and fence.run:
            exec(fence.code, namespace)
            ran += 1
        elif fence.language == "sh":
            for words in commands(fence.code):
                run_line(words, folders, cli)
                ran += 1
    assert ran > 2


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_the_options_that_are_shown(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    lines = [line for fence in fences(page) if fence.language in ("sh", "bash") for line in commands(fence.code)]
    for words in lines:
        if words[0] != "scalefold":
            continue
        command = root.commands[words[1]]
        known = {option for entry in command.params for option in [*entry.opts, *entry.secondary_opts]}
        used = {word.split("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
        assert used <= known, shlex.join(words)


ERRORS = frozenset(
    ("SourceError", "GraphError", "PatternError", "CalibrationError", "KernelError", "OutputError", "InterruptError")
)
COVERED = (
    "artifact", "calibrate", "charts", "cli", "decoder", "driver", "evaluate", "export", "fusing", "gates",
    "generate", "intake", "kernel_library", "protocol", "runtime", "sensitivity", "serving",
    "standard_operators", "task_data", "trainable_weights", "tuning", "user_pass", "verify",
)  # fmt: skip
"""Modules of compiler/ each of whose messages has a row in the page."""


def template(node: ast.expr) -> str:
    """The text of a string as the page writes it: what varies is `…`, and alone a node that is no string."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


def strings(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {template(node) for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)}


def raised(path: Path) -> set[str]:
    """The messages that a module raises directly."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ERRORS and call.args]
    return {text for call in named if re.search("[a-z]", text := template(call.args[0]))}


def rows() -> set[str]:
    """The messages in the tables of the troubleshooting page."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return {message.replace("\\|", "|") for message in re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)}


def test_every_message_of_the_page_is_in_the_source() -> None:
    sources = [path for folder in ("compiler", "passes", "models") for path in (ROOT / folder).glob("*.py")]
    known = set().union(*map(strings, sources))
    assert rows() - known == set()


@pytest.mark.parametrize("module", COVERED)
def test_every_message_of_a_module_is_on_the_page(module: str) -> None:
    assert raised(ROOT / "compiler" / f"{module}.py") - rows() == set()


def test_every_obstacle_of_a_kernel_is_on_the_page() -> None:
    tree = ast.parse((ROOT / "compiler" / "obstacles.py").read_text(encoding="utf-8"))
    built = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    reasons = {
        template(call.args[0])
        for call in built
        if isinstance(call.func, ast.Name) and call.func.id == "Obstacle" and not isinstance(call.args[0], ast.Name)
    }
    named = {
        template(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "reason"
    }
    assert len(reasons | named) > 10
    assert (reasons | named) - rows() == set()
