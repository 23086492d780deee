"""The recipe `w8a8-decode`: weights in blocks, and nothing that is fitted to the calibration samples but a prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scalefold.compiler import compile_model
from scalefold.compiler.decoder import decoder_of
from scalefold.compiler.generate import CachedSession
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.runtime import Session


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_layer_of_a_decoder_runs_in_blocks(decoder_folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    source = decoder_folders[family] / "model.onnx"
    decoder = decoder_of(read_onnx(source))
    feeds = [decoder.prompt_feed(np.arange(24)[None] + start) for start in (5, 40, 90)]
    report = compile_model(source, tmp_path / "out", recipe="w8a8-decode", calibration=feeds)
    kernels = {layer.name: layer.kernel for layer in report.layers}
    assert all(layer.integer for layer in report.layers)
    # tied to the embeddings, of which the file holds one copy
    assert {name for name, kernel in kernels.items() if kernel != "MatMulNBits"} <= {"lm_head"}
    assert {name for name, kernel in kernels.items() if kernel == "MatMulNBits"}

    wanted = Session(source).run(feeds[0])["logits"]
    session = CachedSession(tmp_path / "out" / "model.onnx")
    found, _ = session.step(feeds[0]["input_ids"], None, session.hold(session.decoder.empty_cache()))
    assert np.abs(found - wanted).mean() < 0.02 * np.abs(wanted).mean()
