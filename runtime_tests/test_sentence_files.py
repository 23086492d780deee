"""What sentence-transformers reads beside a model travels with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from scalefold.compiler import compile_model
from scalefold.compiler.runtime import Feed

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def test_modules_and_pooling_are_copied(source_folder: Path, feeds: list[Feed], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(source_folder, source)
    (source / "modules.json").write_text(json.dumps(MODULES))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    compile_model(
        source, tmp_path / "o", recipe="w8a8-naive", calibration=feeds[:24], samples=8, task="feature-extraction"
    )
    for name in ("modules.json", "1_Pooling/config.json", "model.onnx", "config.json", "tokenizer.json"):
        assert (tmp_path / "o" / name).is_file(), name
    assert json.loads((tmp_path / "o" / "modules.json").read_text()) == MODULES
