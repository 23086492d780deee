"""The benchmark of decoders, on given folders: their perplexity is known, one that fails says so, none is touched."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ("a", "b", "c", "d")
BIGRAM = """<ir_version: 10, opset_import: ["" : 20]>
bigram (int64[b, s] input_ids, int64[b, t] attention_mask, float[b, 1, p, 1] k)
    => (float[b, s, 4] logits, float[b, 1, t, 1] k2)
<float[4, 4] table = {0, %(x)s, 0, 0, 0, 0, %(x)s, 0, 0, 0, 0, %(x)s, %(x)s, 0, 0, 0}, int64[2] axes = {1, 3}>
{ logits = Gather(table, input_ids)
  floats = CastLike(input_ids, table)  four = Unsqueeze(floats, axes)  k2 = Concat<axis = 2>(k, four) }"""
"""A decoder that gives the next letter e^x times the probability of any other."""
NAMES = {"k": "past_key_values.0.key", "k2": "present.0.key"}


def bigram(folder: Path, odds: float) -> Path:
    folder.mkdir()
    model = ir.from_onnx_text(BIGRAM % {"x": math.log(odds)})
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.name = NAMES.get(value.name or "", value.name)
    ir.save(model, folder / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_known_perplexities_a_broken_contender_and_folders_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    script = importlib.import_module("bench_decoders")
    blind, knowing = bigram(tmp_path / "blind", odds=1.0), bigram(tmp_path / "knowing", odds=3.0)
    broken, text, found = tmp_path / "broken", tmp_path / "text.txt", tmp_path / "found.json"
    broken.mkdir()
    (broken / "model.onnx").write_bytes(b"no model")
    text.write_text("a b c d\n" * 300, encoding="utf-8")
    options = f"--models letters --float {blind} --compiled w8a8={knowing} --compiled w8a8-token={broken}"
    options += f" --only w8a8,w8a8-token --turns 2 --threads 1 --calibration {text} --data {text} --windows 2"
    options += f" --work {tmp_path / 'work'} --json {found}"
    monkeypatch.setattr(sys, "argv", ["bench_decoders.py", *options.split()])

    script.main()

    reference, better, failed = json.loads(found.read_text(encoding="utf-8"))["rows"]
    assert reference["perplexity"] == pytest.approx(4)  # four letters, equally likely
    assert better["perplexity"] == pytest.approx(2)  # 3 / (3 + 1 + 1 + 1)
    assert {task: len(turns) for task, turns in better["turns"].items()} == {"1x512+0": 2, "1x16+64": 2, "8x16+64": 2}
    assert not failed["turns"] and "it is not an ONNX model" in failed["failure"]
    shown = capsys.readouterr().out
    assert "| 4 | 1 | 0 |" in shown and "| 2 | 0.5 | 0 |" in shown
    assert "decode of 64 x 8, tokens/s" in shown
    assert f"* scalefold w8a8-token failed: {failed['failure']}" in shown
    assert [path.name for path in broken.iterdir()] == ["model.onnx"]
    assert sorted(path.name for path in knowing.iterdir()) == ["model.onnx", "tokenizer.json"]


def test_a_folder_without_a_model_and_an_unknown_contender_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    parser = importlib.import_module("bench_decoders").parser()
    for given, reason in ((f"w8a8={tmp_path}", "there is no model.onnx in"), ("w9=x", "no contender 'w9'; choose")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--compiled", given])
        assert reason in " ".join(capsys.readouterr().err.split())
