from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from scalefold.compiler import CompileReport, Recipe, compile_model, driver, verify
from scalefold.compiler.calibrate import Calibration, TextEncoder
from scalefold.compiler.driver import peak_memory
from scalefold.compiler.errors import CalibrationError, SourceError
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.verify import sqnr

TARGETS = ("onnxruntime-cpu", "qdq")
FAST = Recipe(name="fast")
"""Neither migration nor clipping nor embeddings: for tests that are about something else."""

CLOSE_DB = 25.0
"""Least SQNR of an 8-bit model here. One uint8 input whose range is 5 sigma each way has 10 log10(12 * 255**2 / 100) = 38.9
dB; the noise of the inputs and weights of nine products in a row, 18 sources, adds up to 12.6 dB: 26.3 dB are left."""

SAME_DB = 60.0
"""Least SQNR of two forms of one quantized model. They differ by the order of float operations alone, which moves a value
over the edge between two codes now and then: far less noise than rounding itself makes."""


def outputs_of(session: Session, feeds: list[Feed]) -> Array:
    """The token states of every feed, as rows; without the outlier channels, beside which all noise looks small."""
    states = np.concatenate([session.run(feed)["last_hidden_state"][0] for feed in feeds])
    return np.delete(states, [3, 17], axis=-1)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def folder_of(report: CompileReport) -> Path:
    assert report.output is not None
    return report.output


def record_of(report: CompileReport) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder_of(report) / "scalefold.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("target", TARGETS)
def test_every_linear_layer_of_either_target_runs_on_an_integer_kernel(
    compiled: dict[str, CompileReport], target: str
) -> None:
    report = compiled[target]
    assert len(report.layers) == report.integer_layers == 13
    found = verify.layer_kernels(folder_of(report) / "model.onnx")
    assert [entry.name for entry in found if not entry.integer] == []
    kernels = {"onnxruntime-cpu": {"MatMulIntegerToFloat"}, "qdq": {"MatMulIntegerToFloat", "QGemm"}}
    assert {entry.kernel for entry in found} == kernels[target]


@pytest.mark.parametrize("target", TARGETS)
def test_either_target_is_close_to_float_on_samples_it_has_not_seen(
    compiled: dict[str, CompileReport], float_model: Path, fresh_feeds: list[Feed], target: str
) -> None:
    wanted = outputs_of(Session(float_model), fresh_feeds)
    got = outputs_of(Session(folder_of(compiled[target]) / "model.onnx"), fresh_feeds)
    assert sqnr(wanted, got) >= CLOSE_DB
    for entry in compiled[target].outputs:
        assert entry.sqnr_db >= CLOSE_DB, entry


def test_migration_brings_the_result_closer_to_float(
    compiled: dict[str, CompileReport], float_model: Path, feeds: list[Feed], fresh_feeds: list[Feed], tmp_path: Path
) -> None:
    naive = compile_model(float_model, tmp_path / "naive", recipe="w8a8-naive", calibration=feeds, samples=40)
    wanted, control, migrated = (
        outputs_of(Session(path), fresh_feeds)
        for path in (
            float_model,
            folder_of(naive) / "model.onnx",
            folder_of(compiled["onnxruntime-cpu"]) / "model.onnx",
        )
    )
    assert sqnr(wanted, migrated) > sqnr(wanted, control) + 1.0


def test_the_two_targets_give_the_same_numbers(compiled: dict[str, CompileReport], fresh_feeds: list[Feed]) -> None:
    first, second = (outputs_of(Session(folder_of(compiled[target]) / "model.onnx"), fresh_feeds) for target in TARGETS)
    assert sqnr(first, second) >= SAME_DB


@pytest.mark.parametrize("target", TARGETS)
def test_a_padded_batch_gives_each_sequence_what_it_gets_alone(
    compiled: dict[str, CompileReport], fresh_feeds: list[Feed], target: str
) -> None:
    session = Session(folder_of(compiled[target]) / "model.onnx")
    longest = max(feed["input_ids"].shape[1] for feed in fresh_feeds)
    batch: Feed = {
        name: np.concatenate([np.pad(feed[name], ((0, 0), (0, longest - feed[name].shape[1]))) for feed in fresh_feeds])
        for name in fresh_feeds[0]
    }
    together = session.run(batch)["last_hidden_state"]
    rows = [states[: feed["input_ids"].shape[1]] for states, feed in zip(together, fresh_feeds, strict=True)]
    alone = [session.run(feed)["last_hidden_state"][0] for feed in fresh_feeds]
    assert sqnr(np.concatenate(alone), np.concatenate(rows)) >= SAME_DB


def test_a_second_run_gives_the_same_bytes(
    compiled: dict[str, CompileReport], float_model: Path, feeds: list[Feed], tmp_path: Path
) -> None:
    again = compile_model(float_model, tmp_path / "again", calibration=feeds, samples=40)
    first, second = content_of(folder_of(compiled["onnxruntime-cpu"])), content_of(folder_of(again))
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_bytes_do_not_depend_on_the_order_of_pythons_hashes(float_model: Path, tmp_path: Path) -> None:
    contents = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "scalefold.compiler.cli", "compile", str(float_model), "-o", f"out-{seed}"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([*command, "--samples", "8"], cwd=tmp_path, env=environment, capture_output=True, check=True)
        contents.append(content_of(tmp_path / f"out-{seed}"))
    assert contents[0] == contents[1]


def test_the_record_says_what_was_done_and_with_what(compiled: dict[str, CompileReport], float_model: Path) -> None:
    record = record_of(compiled["onnxruntime-cpu"])
    assert record["schema_version"] == 1
    assert record["source"] == str(float_model)
    assert record["recipe"]["name"] == "w8a8"
    assert record["recipe"]["calibration"]["samples"] == 40
    migration = {"shift": True, "scale": True, "grid": 100, "stride": 8}
    sites = {"norm": True, "linear": True, "value": False, "relu": True, "gate": True}
    assert record["recipe"]["migration"] == migration | sites
    assert record["calibration"]["samples"] == 40
    assert record["calibration"]["origin"] == "feeds"
    assert len(record["calibration"]["digest"]) == 64
    assert record["held_out"] == "16 samples of feeds, held out"
    assert record["tools"]["onnxruntime"] == onnxruntime.__version__
    assert record["tools"]["scalefold"] == version("scalefold")
    assert len(record["layers"]) == 13
    assert all(layer["integer"] and layer["sqnr_db"] > 20 for layer in record["layers"])
    assert {entry["name"] for entry in record["outputs"]} == {"last_hidden_state", "pooler_output"}


def test_the_record_names_every_rewrite_and_every_refusal(compiled: dict[str, CompileReport]) -> None:
    report = compiled["onnxruntime-cpu"]
    passes = {entry["name"]: entry for entry in record_of(report)["passes"]}
    assert list(passes) == [entry.name for entry in report.passes]
    assert len(passes["quantize-weights"]["rewrites"]) == 13
    assert len(passes["migrate-outliers"]["rewrites"]) == 4
    assert len(passes["lower-integer-matmul"]["rewrites"]) == 13
    assert len(passes["fuse-attention"]["rewrites"]) == 2
    first = passes["migrate-outliers"]["rewrites"][0]
    assert first["figures"]["readers"] == 3
    assert first["figures"]["largest_after"] < first["figures"]["largest_before"]
    assert [event["reason"] for event in passes["quantize-embeddings"]["declined"]] == [
        "the table has fewer than 4096 entries"
    ]
    assert passes["quantize-weights"]["contract"] == "LOSSY"


def test_another_calibration_has_another_digest(
    compiled: dict[str, CompileReport], float_model: Path, fresh_feeds: list[Feed], tmp_path: Path
) -> None:
    report = compile_model(float_model, tmp_path / "out", recipe=FAST, calibration=fresh_feeds)
    assert report.calibration["digest"] != compiled["onnxruntime-cpu"].calibration["digest"]
    assert report.held_out == "12 samples of feeds, which were calibrated on: too few to hold any out"


def test_a_dry_run_writes_nothing_and_foresees_layers_and_size(
    compiled: dict[str, CompileReport], float_model: Path, tmp_path: Path
) -> None:
    report = compile_model(float_model, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert report.output is None
    real = compiled["onnxruntime-cpu"]
    assert [layer.name for layer in report.layers] == [layer.name for layer in real.layers]
    assert [layer.shape for layer in report.layers] == [layer.shape for layer in real.layers]
    # The graph itself, without weights, is a third of so small a model, and lowering shortens it.
    weights = (folder_of(real) / "model.onnx.data").stat().st_size
    assert weights < report.bytes < report.float_bytes
    assert compile_model(float_model, None, dry_run=True).bytes == report.bytes


def test_no_output_folder_is_an_error_unless_it_is_a_dry_run(float_model: Path) -> None:
    with pytest.raises(SourceError, match="there is no output folder"):
        compile_model(float_model, None)


def test_excluded_layers_stay_float(float_model: Path, feeds: list[Feed], tmp_path: Path) -> None:
    report = compile_model(
        float_model, tmp_path / "out", recipe=FAST, calibration=feeds, samples=4, exclude=["pooler", r"layer\.0.*query"]
    )
    left = {"pooler.dense", "encoder.layer.0.attention.self.query"}
    assert {layer.name for layer in report.layers if not layer.integer} == left
    assert report.integer_layers == 11
    written = ir.load(tmp_path / "out" / "model.onnx")
    floats = {node.name for node in written.graph if node.op_type == "MatMul" and is_constant(node.inputs[1])}
    assert floats == left
    quantize = next(entry for entry in report.passes if entry.name == "quantize-weights")
    assert {event["where"] for event in quantize.declined} == left
    assert record_of(report)["recipe"]["exclude"] == ["pooler", r"layer\.0.*query"]


def test_only_included_layers_become_integer(float_model: Path, feeds: list[Feed], tmp_path: Path) -> None:
    report = compile_model(
        float_model, tmp_path / "out", recipe=FAST, calibration=feeds, samples=4, include=["intermediate"]
    )
    integer = {layer.name for layer in report.layers if layer.integer}
    assert integer == {f"encoder.layer.{layer}.intermediate.dense" for layer in (0, 1)}


def test_samples_overrides_the_recipe(float_model: Path, feeds: list[Feed], tmp_path: Path) -> None:
    report = compile_model(float_model, tmp_path / "out", recipe=FAST, calibration=feeds, samples=8)
    assert report.calibration["samples"] == 8
    assert report.held_out.endswith("samples of feeds, held out")
    assert record_of(report)["recipe"]["calibration"]["samples"] == 8
    with pytest.raises(CalibrationError, match="0 samples are too few"):
        compile_model(float_model, tmp_path / "out", recipe=FAST, calibration=feeds, samples=0)


def test_the_file_shrinks_to_what_its_codes_take(compiled: dict[str, CompileReport], float_model: Path) -> None:
    report = compiled["onnxruntime-cpu"]
    folder = folder_of(report)
    assert report.bytes == sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert report.float_bytes == sum(path.stat().st_size for path in float_model.parent.glob("model.onnx*"))
    # Weights: 4 bytes become 1, and each column gets a scale and keeps its float bias.
    before = (float_model.parent / "model.onnx.data").stat().st_size
    assert (folder / "model.onnx.data").stat().st_size <= 0.30 * before


def test_the_figures_of_a_report_hold_together(compiled: dict[str, CompileReport]) -> None:
    for target, report in compiled.items():
        assert report.target == target
        assert report.recipe == "w8a8"
        assert 0 < report.load_seconds < 30
        assert {"intake", "migrate-outliers", "clip-ranges", "write", "verify"} <= set(report.seconds)
        assert all(seconds >= 0 for seconds in report.seconds.values())
        for entry in report.outputs:
            assert 0.5 < entry.min_cosine <= entry.mean_cosine <= 1.0 + 1e-6
            assert entry.max_error > 0
        assert {layer.shape for layer in report.layers} == {(64, 64), (64, 128), (128, 64)}


def test_peak_memory_is_of_this_process_and_stays_out_of_the_record(compiled: dict[str, CompileReport]) -> None:
    report = compiled["onnxruntime-cpu"]
    assert report.float_bytes < report.peak_bytes <= peak_memory()
    assert not {"peak_bytes", "export_peak_bytes", "seconds", "load_seconds", "output"} & set(record_of(report))


class Reader:
    """An object with the interface of onnxruntime's CalibrationDataReader."""

    def __init__(self, feeds: list[Feed]) -> None:
        self._rest = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._rest, None)


def as_json_lines(feeds: list[Feed], folder: Path) -> Path:
    path = folder / "feeds.jsonl"
    lines = [json.dumps({name: array.tolist() for name, array in feed.items()}) for feed in feeds]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


FEED_SOURCES: dict[str, Callable[[list[Feed], Path], object]] = {
    "a list": lambda feeds, folder: feeds,
    "a generator": lambda feeds, folder: (feed for feed in feeds),
    "a data reader": lambda feeds, folder: Reader(feeds),
    "JSON lines": as_json_lines,
}


@pytest.mark.parametrize("kind", FEED_SOURCES)
def test_feeds_calibrate_alike_in_whatever_form_they_come(
    float_model: Path, fresh_feeds: list[Feed], tmp_path: Path, kind: str
) -> None:
    report = compile_model(
        float_model, tmp_path / "out", recipe=FAST, calibration=FEED_SOURCES[kind](fresh_feeds, tmp_path)
    )
    assert report.calibration["samples"] == 12
    wanted = Calibration(lambda: iter(fresh_feeds), 12, "").digest()
    assert report.calibration["digest"] == wanted


def test_an_npz_gives_batches_of_its_rows(float_model: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(5, 200, (20, 9))
    np.savez(tmp_path / "feeds.npz", input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
    report = compile_model(float_model, tmp_path / "out", recipe=FAST, calibration=tmp_path / "feeds.npz")
    assert report.integer_layers == 13
    assert report.calibration["origin"] == str(tmp_path / "feeds.npz")


TEXTS = [f"the value of the argument is {word} and it is used by the module" for word in ("a", "not", "an", "if")]


def text_file(folder: Path) -> Path:
    (folder / "texts.txt").write_text("\n".join(["", "too short", *TEXTS]), encoding="utf-8")
    return folder / "texts.txt"


def text_lines(folder: Path) -> Path:
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    return folder / "texts.jsonl"


TEXT_SOURCES: dict[str, Callable[[Path], object]] = {
    "a list": lambda folder: TEXTS,
    "a text file": text_file,
    "JSON lines": text_lines,
}


@pytest.mark.parametrize("kind", TEXT_SOURCES)
def test_texts_calibrate_alike_in_whatever_form_they_come(float_model: Path, tmp_path: Path, kind: str) -> None:
    report = compile_model(float_model, tmp_path / "out", recipe=FAST, calibration=TEXT_SOURCES[kind](tmp_path))
    assert report.calibration["samples"] == 4
    encode = TextEncoder(float_model.parent / "tokenizer.json", ir.load(float_model), 64)
    wanted = Calibration(lambda: map(encode, TEXTS), 4, "").digest()
    assert report.calibration["digest"] == wanted


def test_without_calibration_the_text_of_python_is_taken_and_the_report_says_so(
    float_model: Path, tmp_path: Path
) -> None:
    # The recipe asks for 128 tokens a sample; the model has positions for 64.
    report = compile_model(float_model, tmp_path / "out", recipe=FAST, samples=40)
    assert "English text of the Python installation" in report.calibration["origin"]
    assert report.held_out.startswith("16 samples of English text")


def test_a_model_object_compiles_and_loads_with_transformers(
    tiny_model: Any, fresh_feeds: list[Feed], feeds: list[Feed], tmp_path: Path
) -> None:
    import torch
    from transformers.exporters import ExportedModel

    report = compile_model(tiny_model, tmp_path / "out", calibration=feeds, samples=16)
    assert report.source == "BertModel"
    assert report.integer_layers == len(report.layers) == 13
    assert report.export_peak_bytes > 0
    loaded = ExportedModel.from_pretrained(tmp_path / "out")
    arguments = {name: torch.from_numpy(array) for name, array in fresh_feeds[0].items()}
    got = loaded(**arguments).last_hidden_state.numpy()
    with torch.no_grad():
        wanted = tiny_model(**arguments).last_hidden_state.numpy()
    assert sqnr(wanted, got) >= CLOSE_DB
    assert not (tmp_path / "out" / "source").exists()


def test_the_folder_of_a_hugging_face_model_keeps_tokenizer_config_and_manifest(
    source_folder: Path,
    float_model: Path,
    fresh_feeds: list[Feed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from transformers import AutoTokenizer
    from transformers.exporters import ExportedModel

    def exported(source: object, folder: Path, task: str | None) -> None:
        assert source == str(source_folder)  # the export itself is done once a session
        shutil.copytree(float_model.parent, folder)

    monkeypatch.setattr(driver, "export_model", exported)
    report = compile_model(str(source_folder), tmp_path / "out", recipe=FAST, samples=4)
    assert report.source == str(source_folder)
    names = {path.name for path in folder_of(report).iterdir()}
    kept = {"tokenizer.json", "tokenizer_config.json", "config.json"}
    assert names == kept | {"model.onnx", "model.onnx.data", "export.json", "scalefold.json", "ranges.npz"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the module")["input_ids"][0] == 2
    loaded = ExportedModel.from_pretrained(tmp_path / "out")
    states = loaded(**{name: torch.from_numpy(array) for name, array in fresh_feeds[0].items()}).last_hidden_state
    wanted = Session(tmp_path / "out" / "model.onnx").run(fresh_feeds[0])["last_hidden_state"]
    np.testing.assert_array_equal(states.numpy(), wanted)


def test_the_folder_of_an_onnx_file_loads_with_transformers(
    compiled: dict[str, CompileReport], fresh_feeds: list[Feed]
) -> None:
    import torch
    from transformers.exporters import ExportedModel

    for report in compiled.values():
        loaded = ExportedModel.from_pretrained(folder_of(report))
        got = loaded(**{name: torch.from_numpy(array) for name, array in fresh_feeds[0].items()})
        wanted = Session(folder_of(report) / "model.onnx").run(fresh_feeds[0])
        assert set(got) == set(wanted)
        np.testing.assert_array_equal(got["last_hidden_state"].numpy(), wanted["last_hidden_state"])


def test_onnxruntime_alone_opens_the_folder(compiled: dict[str, CompileReport], fresh_feeds: list[Feed]) -> None:
    for report in compiled.values():
        session = onnxruntime.InferenceSession(folder_of(report) / "model.onnx", providers=["CPUExecutionProvider"])
        assert [entry.name for entry in session.get_inputs()] == ["input_ids", "token_type_ids", "attention_mask"]
        states, pooled = session.run(["last_hidden_state", "pooler_output"], dict(fresh_feeds[0]))
        assert states.shape == (1, fresh_feeds[0]["input_ids"].shape[1], 64)
        assert np.isfinite(states).all()
        assert pooled.shape == (1, 64)


def test_progress_is_told_of_every_long_stage(float_model: Path, feeds: list[Feed], tmp_path: Path) -> None:
    from contextlib import contextmanager

    seen: dict[str, list[int]] = {}

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Callable[[], None]]:
        entry = seen.setdefault(title, [total, 0])

        def advance() -> None:
            entry[1] += 1

        yield advance

    compile_model(float_model, tmp_path / "out", recipe=FAST, calibration=feeds, samples=40, progress=bar)
    assert seen["calibrating"] == [40, 40]
    assert seen["quantizing weights"] == [13, 13]
    assert seen["verifying"] == [3, 3]


def test_the_report_can_be_written_as_json(compiled: dict[str, CompileReport]) -> None:
    again = json.loads(json.dumps(asdict(compiled["qdq"]), default=str))
    assert again["target"] == "qdq"
    assert len(again["layers"]) == 13
