"""The benchmark of compiling: a model is compiled by the command line, and the table says what that took."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest


def test_one_line_for_a_model_and_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    script = importlib.import_module("bench_compile")
    found = tmp_path / "found.json"
    options = f"gpt2-tiny --recipe w8a8-naive --samples 8 --work {tmp_path / 'work'} --json {found}"
    monkeypatch.setattr(sys, "argv", ["bench_compile.py", *options.split()])
    script.main()
    facts = json.loads(found.read_text(encoding="utf-8"))["models"]["gpt2-tiny"]
    assert (tmp_path / "work/gpt2-tiny/compiled/model.onnx").is_file()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| gpt2-tiny")]
    assert f"| {facts['peak_bytes'] / facts['float_bytes']:.2f} |" in line and "verify" in line

    monkeypatch.setattr(sys, "argv", ["bench_compile.py", str(tmp_path / "missing")])
    with pytest.raises(SystemExit, match="missing: scalefold compile ended with exit code"):
        script.main()
