"""Every kind of bad input: one sentence with what, where and remedy; an exit code; and earlier output left whole."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from scalefold.compiler import CompileReport, compile_model
from scalefold.compiler.errors import OutputError, SourceError
from scalefold.compiler.runtime import Feed

Cli = Callable[..., subprocess.CompletedProcess[str]]
Prepare = Callable[[Path, Path], tuple[object, ...]]
"""(scratch folder, float model) to the arguments of the command; an earlier result lies in `out`."""


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def earlier(compiled: dict[str, CompileReport], tmp_path: Path) -> Path:
    """An earlier result, at the place that commands write to."""
    folder = compiled["onnxruntime-cpu"].output
    assert folder is not None
    shutil.copytree(folder, tmp_path / "out")
    return tmp_path / "out"


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error ")
    assert lines[0].endswith(".")
    assert "; " in lines[0], "no remedy"
    for part in parts:
        assert part in lines[0], lines[0]
    assert done.stdout == ""


def no_such_file(folder: Path, model: Path) -> tuple[object, ...]:
    return ("missing.onnx",)


def no_such_id(folder: Path, model: Path) -> tuple[object, ...]:
    return ("nobody/no-such-model",)


def not_onnx(folder: Path, model: Path) -> tuple[object, ...]:
    (folder / "text.onnx").write_text("this is no model\n" * 50, encoding="utf-8")
    return ("text.onnx",)


def empty_file(folder: Path, model: Path) -> tuple[object, ...]:
    (folder / "empty.onnx").touch()
    return ("empty.onnx",)


def cut_short(folder: Path, model: Path) -> tuple[object, ...]:
    whole = model.read_bytes()
    (folder / "short.onnx").write_bytes(whole[: len(whole) // 2])
    return ("short.onnx",)


def without_data(folder: Path, model: Path) -> tuple[object, ...]:
    shutil.copyfile(model, folder / "model.onnx")
    return ("model.onnx",)


def data_cut_short(folder: Path, model: Path) -> tuple[object, ...]:
    shutil.copyfile(model, folder / "model.onnx")
    data = model.with_name("model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(data[: len(data) // 2])
    return ("model.onnx",)


def three_faults(folder: Path, model: Path) -> tuple[object, ...]:
    recipe = "weights: {bits: 9}\nactivations: {clipping: fast}\nmigraton: {shift: true}\n"
    (folder / "bad.yaml").write_text(recipe, encoding="utf-8")
    return (model, "--recipe", "bad.yaml")


def not_yaml(folder: Path, model: Path) -> tuple[object, ...]:
    (folder / "bad.yaml").write_text("weights: [1, 2", encoding="utf-8")
    return (model, "--recipe", "bad.yaml")


def no_such_recipe(folder: Path, model: Path) -> tuple[object, ...]:
    return (model, "--recipe", "w7a7")


def unknown_pipeline(folder: Path, model: Path) -> tuple[object, ...]:
    (folder / "bad.yaml").write_text("pipeline: no.such.module:pipeline\n", encoding="utf-8")
    return (model, "--recipe", "bad.yaml")


def with_option(*option: str) -> Prepare:
    def prepare(folder: Path, model: Path) -> tuple[object, ...]:
        return (model, "--samples", "2", *option)

    return prepare


def calibration_file(name: str, content: str) -> Prepare:
    def prepare(folder: Path, model: Path) -> tuple[object, ...]:
        (folder / name).write_text(content, encoding="utf-8")
        return (model, "--calibration", name)

    return prepare


def npz(**arrays: np.ndarray) -> Prepare:
    def prepare(folder: Path, model: Path) -> tuple[object, ...]:
        np.savez(folder / "feeds.npz", allow_pickle=False, **arrays)
        return (model, "--calibration", "feeds.npz")

    return prepare


def not_npz(folder: Path, model: Path) -> tuple[object, ...]:
    (folder / "feeds.npz").write_bytes(b"PK\x03\x04 and no more")
    return (model, "--calibration", "feeds.npz")


def cut_npz(folder: Path, model: Path) -> tuple[object, ...]:
    np.savez(folder / "whole.npz", input_ids=IDS, attention_mask=IDS, token_type_ids=IDS)
    whole = (folder / "whole.npz").read_bytes()
    (folder / "feeds.npz").write_bytes(whole[: len(whole) // 2])
    return (model, "--calibration", "feeds.npz")


def no_tokenizer(folder: Path, model: Path) -> tuple[object, ...]:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(model.with_name(name), folder / name)
    return ("model.onnx",)


def broken_tokenizer(folder: Path, model: Path) -> tuple[object, ...]:
    no_tokenizer(folder, model)
    (folder / "tokenizer.json").write_text('{"version": "1.0"', encoding="utf-8")
    return ("model.onnx",)


def float_input_model(nodes: list[onnx.NodeProto], initializers: dict[str, np.ndarray]) -> onnx.ModelProto:
    shape: list[str | int | None] = ["batch", "sequence", 8]
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


EYE = np.eye(8, dtype=np.float32)


def with_nan_feeds(folder: Path, model: Path) -> tuple[object, ...]:
    onnx.save(
        float_input_model([helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": EYE}), folder / "m.onnx"
    )
    feeds = np.ones((4, 3, 8), dtype=np.float32)
    feeds[2, 1, 5] = np.nan
    np.savez(folder / "feeds.npz", x=feeds)
    return ("m.onnx", "--calibration", "feeds.npz")


def nan_inside(folder: Path, model: Path) -> tuple[object, ...]:
    nodes = [helper.make_node("Log", ["x"], ["l"]), helper.make_node("MatMul", ["l", "w"], ["y"], name="fc")]
    onnx.save(float_input_model(nodes, {"w": EYE}), folder / "m.onnx")
    np.savez(folder / "feeds.npz", x=np.full((4, 3, 8), -1.0, dtype=np.float32))
    return ("m.onnx", "--calibration", "feeds.npz")


def unknown_operator(folder: Path, model: Path) -> tuple[object, ...]:
    nodes = [
        helper.make_node("Frobnicate", ["x"], ["f"], domain="acme"),
        helper.make_node("MatMul", ["f", "w"], ["y"], name="fc"),
    ]
    onnx.save(float_input_model(nodes, {"w": EYE}), folder / "m.onnx")
    np.savez(folder / "feeds.npz", x=np.ones((4, 3, 8), dtype=np.float32))
    return ("m.onnx", "--calibration", "feeds.npz")


def no_linear_layer(folder: Path, model: Path) -> tuple[object, ...]:
    onnx.save(float_input_model([helper.make_node("Exp", ["x"], ["y"])], {}), folder / "m.onnx")
    return ("m.onnx",)


def quantized_already(folder: Path, model: Path) -> tuple[object, ...]:
    return ("out/model.onnx",)


IDS = np.full((4, 6), 7)
ONES = np.ones_like(IDS)
CASES: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "no such file": (no_such_file, ("missing.onnx: there is no such file", "check the path")),
    "no such id": (no_such_id, ("nobody/no-such-model: no model can be loaded from it", "check the spelling")),
    "not ONNX": (not_onnx, ("text.onnx: it is not an ONNX model, or it is cut short", "download it again")),
    "an empty file": (empty_file, ("empty.onnx: it is not an ONNX model, or it is cut short",)),
    "a graph cut short": (cut_short, ("short.onnx: it is not an ONNX model, or it is cut short",)),
    "external data missing": (without_data, ("external data file model.onnx.data is missing", "put the whole")),
    "external data cut short": (data_cut_short, ("external data file model.onnx.data is cut short", "put the whole")),
    "a recipe with three faults": (
        three_faults,
        (
            "bad.yaml: 3 faults in the recipe",
            "weights.bits: input should be less than or equal to 8, got 9",
            "activations.clipping: input should be a valid number",
            "migraton: no such key",
        ),
    ),
    "a recipe that is not YAML": (not_yaml, ("bad.yaml: 1 fault in the recipe: not YAML",)),
    "no such recipe": (
        no_such_recipe,
        ("w7a7: 1 fault", "no recipe of this name", "w6a6, w8a8-decode, w8a8-naive, w8a8"),
    ),
    "a recipe with an unknown pipeline": (unknown_pipeline, ("pipeline: 'no.such.module:pipeline' cannot be used",)),
    "exclude matches nothing": (
        with_option("--exclude", "decoder"),
        ("exclude pattern 'decoder': it matches none of the 13 linear layers", "scalefold inspect"),
    ),
    "include matches nothing": (
        with_option("--include", "decoder"),
        ("include pattern 'decoder': it matches none of the 13 linear layers", "scalefold inspect"),
    ),
    "allow-float matches nothing": (
        with_option("--allow-float", "decoder"),
        ("allow-float pattern 'decoder': it matches none of the 13 linear layers", "scalefold inspect"),
    ),
    "a pattern that is no regular expression": (
        with_option("--exclude", "layer[0"),
        ("exclude pattern 'layer[0': it is not a regular expression", "backslash"),
    ),
    "patterns that leave nothing": (with_option("--exclude", "."), ("exclude", "patterns")),
    "no samples": (with_option("--samples", "0"), ("--samples: 0 samples are too few", "give at least 1")),
    "an unknown target": (
        with_option("--target", "gpu"),
        ("--target: there is no target 'gpu'", "onnxruntime-cpu or qdq"),
    ),
    "calibration missing": (with_option("--calibration", "none.txt"), ("none.txt: there is no such file",)),
    "calibration text empty": (
        calibration_file("empty.txt", ""),
        ("empty.txt: it holds no samples", "give at least one"),
    ),
    "calibration text of short lines": (
        calibration_file("short.txt", "one\ntwo\n"),
        ("short.txt: it holds no samples",),
    ),
    "JSON lines empty": (calibration_file("empty.jsonl", "\n"), ("empty.jsonl: it holds no samples",)),
    "JSON lines broken": (calibration_file("bad.jsonl", '{"text": "a b'), ("bad.jsonl: it cannot be read",)),
    "JSON lines of numbers": (calibration_file("bad.jsonl", "1\n2\n"), ("bad.jsonl: it cannot be read", "object")),
    "JSON lines with ragged rows": (
        calibration_file(
            "bad.jsonl", '{"input_ids": [[1, 2], [3]], "attention_mask": [1, 1], "token_type_ids": [0, 0]}'
        ),
        ("bad.jsonl",),
    ),
    "feeds that the model does not take": (
        npz(input_ids=IDS, pixel_values=ONES),
        ("sample 0 of feeds.npz: the model does not take pixel_values", "it takes input_ids"),
    ),
    "feeds that lack an input": (
        npz(input_ids=IDS),
        ("sample 0 of feeds.npz: it lacks token_type_ids, attention_mask",),
    ),
    "feeds of different numbers": (
        npz(input_ids=IDS, attention_mask=ONES[:2], token_type_ids=ONES),
        ("feeds.npz", "the arrays hold different numbers of samples"),
    ),
    "feeds with token ids beyond the table": (
        npz(input_ids=IDS + 1000, attention_mask=ONES, token_type_ids=ONES * 0),
        ("onnxruntime", "token ids"),
    ),
    "feeds longer than the model's positions": (
        npz(input_ids=np.full((4, 70), 7), attention_mask=np.ones((4, 70), int), token_type_ids=np.zeros((4, 70), int)),
        ("onnxruntime", "shapes"),
    ),
    "feeds of another type": (
        npz(input_ids=IDS * 1.0, attention_mask=ONES, token_type_ids=ONES * 0),
        ("sample 0 of feeds.npz: input_ids holds float64, not int64", "give what the model takes"),
    ),
    "feeds of another rank": (
        npz(input_ids=IDS[0], attention_mask=ONES[0], token_type_ids=ONES[0]),
        ("sample 0 of feeds.npz: input_ids has shape [6], not [", "give what the model takes"),
    ),
    "feeds with no samples": (npz(input_ids=IDS[:0], attention_mask=IDS[:0], token_type_ids=IDS[:0]), ("no samples",)),
    "feeds that are not an npz": (not_npz, ("feeds.npz: it cannot be read",)),
    "feeds cut short": (cut_npz, ("feeds.npz: it cannot be read",)),
    "feeds with NaN": (with_nan_feeds, ("sample 0 of feeds.npz: x holds NaN or infinity", "remove the sample")),
    "NaN inside the model": (nan_inside, ("the activation l becomes NaN or infinite", "finite outputs")),
    "neither tokenizer nor calibration": (
        no_tokenizer,
        ("calibration: text needs a tokenizer", "--calibration feeds.npz"),
    ),
    "a tokenizer cut short": (broken_tokenizer, ("tokenizer.json",)),
    "an unknown operator": (unknown_operator, ("Frobnicate",)),
    "no linear layer": (no_linear_layer, ("m.onnx: the graph has no linear layer", "float transformer")),
    "a model that is quantized already": (quantized_already, ("the graph has no linear layer", "quantized already")),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence_and_earlier_output_stays_whole(
    case: str, float_model: Path, earlier: Path, tmp_path: Path, cli: Cli
) -> None:
    before = content_of(earlier)
    prepare, parts = CASES[case]
    done = cli("compile", *prepare(tmp_path, float_model), "-o", "out")
    assert_one_sentence(done, *parts)
    assert content_of(earlier) == before
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_task_that_does_not_exist_is_refused(source_folder: Path, earlier: Path, cli: Cli) -> None:
    before = content_of(earlier)
    done = cli("compile", source_folder, "-o", "out", "--task", "poetry")
    assert_one_sentence(done, "--task: there is no task 'poetry'", "choose from feature-extraction, masked-lm")
    assert content_of(earlier) == before


def test_a_folder_that_is_not_ours_is_not_touched(float_model: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work", encoding="utf-8")
    done = cli("compile", float_model, "-o", "mine")
    assert_one_sentence(done, "mine: the folder holds other files, and nothing was written", "give a new folder")
    assert content_of(tmp_path / "mine") == {"thesis.tex": b"years of work"}


def test_an_output_that_is_a_file_is_not_touched(float_model: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    done = cli("compile", float_model, "-o", "file")
    assert_one_sentence(done, "file: it is not a folder, and nothing was written", "give a new folder")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_an_output_below_a_file_cannot_be_written(float_model: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    done = cli("compile", float_model, "-o", "file/out")
    assert_one_sentence(done, "file/out: it cannot be written", "give another folder")


def test_a_read_only_place_cannot_be_written(float_model: Path, cli: Cli) -> None:
    # /proc takes no new folders, not even from root.
    assert_one_sentence(
        cli("compile", float_model, "-o", "/proc/out"), "/proc/out: it cannot be written", "another folder"
    )


def test_no_output_is_an_error(float_model: Path, cli: Cli) -> None:
    assert_one_sentence(cli("compile", float_model), "output: there is no output folder", "dry run")


def test_a_full_disk_is_named_and_earlier_output_stays_whole(
    float_model: Path, feeds: list[Feed], earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content_of(earlier)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(OutputError, match=r"it cannot be written \(the disk is full\), .*; free some space"):
        compile_model(float_model, earlier, recipe="w8a8-naive", calibration=feeds, samples=2)
    assert content_of(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_outgrows_its_limit_is_one_sentence(float_model: Path, earlier: Path, tmp_path: Path) -> None:
    before = content_of(earlier)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # less than model.onnx.data, more than any feed

    command = (sys.executable, "-m", "scalefold.compiler.cli", "compile", str(float_model), "-o", "out")
    done = subprocess.run(
        [*command, "--recipe", "w8a8-naive", "--samples", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert_one_sentence(done, "out: it cannot be written (the disk is full)", "free some space")
    assert content_of(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_the_earlier_output_whole(
    number: signal.Signals, float_model: Path, earlier: Path, tmp_path: Path
) -> None:
    before = content_of(earlier)
    command = (sys.executable, "-m", "scalefold.compiler.cli", "compile", str(float_model), "-o", "out")
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")):
        assert running.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline, "it never began to write"
        time.sleep(0.01)
    time.sleep(0.3)
    running.send_signal(number)
    stdout, stderr = running.communicate(timeout=60)
    done = subprocess.CompletedProcess(command, running.returncode, stdout, stderr)
    assert_one_sentence(done, "it was interrupted", "earlier output is whole", code=130)
    assert content_of(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_wrong_option_shows_how_to_use_the_command(float_model: Path, cli: Cli) -> None:
    done = cli("compile", float_model, "-o", "out", "--bits", "8")
    assert done.returncode == 2
    assert "No such option: --bits" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_number_that_is_none_shows_how_to_use_the_command(float_model: Path, cli: Cli) -> None:
    done = cli("compile", float_model, "-o", "out", "--samples", "many")
    assert done.returncode == 2
    assert "--samples" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_an_operator_that_onnxruntime_lacks_stops_no_command_with_a_traceback(
    command: str, tmp_path: Path, cli: Cli
) -> None:
    name = unknown_operator(tmp_path, tmp_path)[0]
    done = cli(command, name)
    assert "Traceback" not in done.stderr
    if command == "inspect":
        assert (done.returncode, "fc" in done.stdout) == (0, True), done.stderr
    else:
        assert_one_sentence(done, "m.onnx: onnxruntime", "cannot load the graph", "Frobnicate")


def test_a_source_that_may_not_be_read_is_not_taken_for_a_full_disk(
    float_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(ir, "load", forbidden)
    with pytest.raises(SourceError, match=r"model.onnx: it cannot be read \(Permission denied\); check"):
        compile_model(float_model, tmp_path / "out")


COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "verify of nothing": (("verify", "nowhere"), ("nowhere: there is no model.onnx in it", "give a compiled folder")),
    "verify of text": (("verify", "text.onnx"), ("text.onnx", "not an ONNX model")),
    "inspect of nothing": (("inspect", "nowhere.onnx"), ("nowhere.onnx: there is no such file", "check the path")),
    "inspect of text": (("inspect", "text.onnx"), ("text.onnx: it is not an ONNX model", "download it again")),
    "inspect of a folder without a model": (("inspect", "."), ("model.onnx: there is no such file",)),
    "eval of nothing": (("eval", "nowhere", "--data", "sts.csv"), ("nowhere: there is no", "give a compiled folder")),
    "eval of other data": (
        ("eval", "out", "--data", "text.onnx"),
        ("text.onnx: it is not a file of the STS benchmark",),
    ),
    "eval of missing data": (
        ("eval", "out", "--data", "gone.csv"),
        ("gone.csv: it is not a file of the STS benchmark",),
    ),
    "eval by an unknown metric": (
        ("eval", "out", "--data", "sts.csv", "--metric", "bleu"),
        ("--metric: there is no metric 'bleu'", "choose from sts, perplexity"),
    ),
    "eval of fidelity without a float model": (
        ("eval", "out", "--data", "text.onnx", "--metric", "fidelity"),
        ("eval: the fidelity metric needs the float model", "--against"),
    ),
    "eval of fidelity on missing text": (
        ("eval", "out", "--data", "gone.txt", "--metric", "fidelity", "--against", "out"),
        ("gone.txt: it cannot be read", "give UTF-8 text"),
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_other_commands_refuse_bad_input_in_one_sentence(
    case: str, earlier: Path, tmp_path: Path, cli: Cli
) -> None:
    before = content_of(earlier)
    (tmp_path / "text.onnx").write_text("this is no model and no table\n" * 50, encoding="utf-8")
    (tmp_path / "sts.csv").write_text("g\tf\ty\t1\t5.0\ta b\ta b\n" * 2, encoding="utf-8")
    arguments, parts = COMMANDS[case]
    assert_one_sentence(cli(*arguments), *parts)
    assert content_of(earlier) == before


def test_verify_refuses_a_record_that_is_broken(earlier: Path, cli: Cli) -> None:
    (earlier / "scalefold.json").write_text("{", encoding="utf-8")
    assert_one_sentence(cli("verify", "out"), "out: there is no readable scalefold.json in it", "scalefold compile")
