from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("compiler", "passes", "models")
HEAVY = ("torch", "transformers", "onnxscript", "scipy")


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_compiler_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, scalefold.compiler, scalefold.compiler.cli, scalefold.passes, scalefold.models.minilm\n"
    assert run(code + f"print(sorted(set({HEAVY!r}) & set(sys.modules)))") == "[]"


def test_compiling_an_onnx_file_needs_neither_torch_nor_transformers(float_model: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY!r}))  # None there makes every import of them fail
from scalefold.compiler import compile_model
report = compile_model(sys.argv[1], sys.argv[2], samples=2)
print(report.integer_layers)
"""
    assert run(code, float_model, tmp_path / "out") == "13"


def test_the_public_names_are_those_that_are_documented() -> None:
    import scalefold.compiler as package

    assert package.__all__ == sorted(package.__all__, key=lambda name: (name[0].islower(), name))
    for name in package.__all__:
        assert getattr(package, name).__doc__, name


@pytest.mark.slow
def test_a_wheel_holds_every_module_recipe_type_marker_and_trained_model(tmp_path: Path) -> None:
    source = tmp_path / "source"  # setuptools leaves a build folder beside what it builds
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--quiet", "-w", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("scalefold-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("scalefold/")}
    wanted = {
        f"scalefold/{path.relative_to(source)}"
        for folder in FOLDERS
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    weights = {name for name in wanted if name.endswith(".safetensors")}
    assert len(wanted) > 40 and len(weights) == 3
    assert held == wanted
