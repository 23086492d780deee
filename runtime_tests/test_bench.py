"""`scalefold bench`: what every node does at least, which ceiling bounds it, and that ceilings are measured once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import bench, ceilings, cli, machine
from scalefold.compiler.bench import Shape, Work, latency, parse_shape, profile, work_of
from scalefold.compiler.ceilings import Ceilings
from scalefold.compiler.errors import SourceError
from scalefold.compiler.node_timing import NodeTime, Operand, node_times

BEST = Ceilings(integer=100e9, floating=50e9, memory=10e9, cache=40e9, node=1e-6)
MODEL = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
model (int64[b, s] input_ids) => (float[b, s, 32] y)
<float scale = {0.1}, uint8 zero = {1}, int64[2] sizes = {64, 32}, int64[2] table_sizes = {100, 64}>
{ table = ConstantOfShape<value = float[1] {0.5}>(table_sizes)  x = Gather(table, input_ids)
  q = QuantizeLinear(x, scale, zero)  w = ConstantOfShape<value = int8[1] {2}>(sizes)
  y = com.microsoft.MatMulIntegerToFloat(q, w, scale, scale, zero) }"""
DECODER = """<ir_version: 10, opset_import: ["" : 20]>
model (int64[b, s] input_ids, int64[b, t] attention_mask, float[b, 2, p, 4] k)
    => (float[b, s, 4] logits, float[b, 2, p, 4] k2)
<int64[2] sizes = {100, 4}> { table = ConstantOfShape<value = float[1] {0.5}>(sizes)
  logits = Gather(table, input_ids)  k2 = Identity(k) }"""


def saved(folder: Path, text: str) -> Path:
    model = ir.from_onnx_text(text)
    names = {"k": "past_key_values.0.key", "k2": "present.0.key"}
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.name = names.get(value.name or "", value.name)
    ir.save(model, folder / "model.onnx")
    return folder


def floats(*shape: int) -> Operand:
    return Operand("float", shape)


def test_a_product_with_a_constant_streams_its_weight_and_one_with_an_activation_does_not() -> None:
    packed = NodeTime(
        "a", "MatMulIntegerToFloat", 1.0, (Operand("uint8", (2, 3, 64)), Operand("float", ())), (floats(2, 3, 32),)
    )
    assert work_of(packed) == Work(2 * 6 * 64 * 32, True, 64 * 32, 6 * 64 + 4 * 6 * 32, "6 x 64 x 32")
    plain = NodeTime("a", "MatMul", 1.0, (floats(1, 3, 64), floats(64, 32)), (floats(1, 3, 32),))
    assert (work_of(plain).weight_bytes, work_of(plain).integer) == (4 * 64 * 32, False)
    scores = NodeTime("a", "MatMul", 1.0, (floats(1, 2, 5, 4), floats(1, 2, 4, 7)), (floats(1, 2, 5, 7),))
    assert (work_of(scores).weight_bytes, work_of(scores).operations) == (0, 2 * 2 * 5 * 4 * 7)
    blocks = NodeTime("a", "MatMulNBits", 1.0, (floats(1, 1, 64),), (floats(1, 1, 32),))
    assert work_of(blocks, bits=5).weight_bytes == 64 * 32 * 5 / 8


def test_a_product_of_the_library_streams_its_panels() -> None:
    for kernel, panels, width in (
        ("RowLinear", Operand("int8", (2, 24, 64, 4)), 1),
        ("RowLinear", Operand("int8", (2, 3, 16, 64)), 0.5),
        ("FloatLinear", Operand("bfloat16", (2, 48, 64, 2)), 2),
    ):
        gated = NodeTime("a", kernel, 1.0, (floats(1, 5, 192), panels, floats(100)), (floats(1, 5, 100),))
        work = work_of(gated)
        assert (work.size, work.operations) == ("5 x 96 x 100", 2 * 5 * 96 * 100)
        assert work.weight_bytes == 96 * 100 * width
        assert work.integer == (kernel == "RowLinear")


def test_attention_counts_every_position_and_a_gather_only_what_it_takes() -> None:
    query, key = floats(1, 2, 8), floats(1, 2, 8)
    cache = floats(1, 4, 66, 2)
    entry = NodeTime("a", "Attention", 1.0, (query, key, key, floats(1, 1, 2, 68), floats(1, 4, 66, 2)), (query, cache))
    assert work_of(entry).operations == 4 * 16 * 66
    picked = NodeTime("a", "Gather", 1.0, (floats(50000, 64), Operand("int64", (1, 2))), (floats(1, 2, 64),))
    assert work_of(picked).activation_bytes == 2 * 4 * 2 * 64


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        (Work(1e9, True, 0, 0, ""), 0.01, "integer peak"),
        (Work(1e9, False, 0, 0, ""), 0.02, "float peak"),
        (Work(1e6, True, 1e8, 0, ""), 0.01, "memory"),
        (Work(0, False, 0, 4e8, ""), 0.01, "cache"),
        (Work(0, False, 0, 4, ""), 1e-6, "node"),
    ],
)
def test_the_largest_term_of_the_floor_names_what_bounds_a_node(work: Work, seconds: float, bound: str) -> None:
    least, name = work.floor(BEST)
    assert least == pytest.approx(seconds)
    assert name == bound


def test_a_profile_adds_up_to_the_run_and_names_its_layers(tmp_path: Path) -> None:
    folder = saved(tmp_path, MODEL)
    timed = latency(folder, Shape(2, 3), threads=1, runs=3)
    found = profile(folder, timed, BEST, threads=1)

    assert found.seconds >= timed.seconds[0]
    assert sum(line.seconds for line in found.lines) + found.between == pytest.approx(found.seconds)
    assert sum(line.share for line in found.lines) <= 1 + 1e-9
    product = next(line for line in found.lines if line.kernel == "MatMulIntegerToFloat")
    assert (product.size, product.unit, product.nodes) == ("6 x 64 x 32", "GOPS", 1)
    assert product.rate == pytest.approx(2 * 6 * 64 * 32 / product.seconds / 1e9)
    assert product.reached == pytest.approx(product.rate / product.ceiling)
    assert {line.kernel for line in found.layers} == {"Gather", "QuantizeLinear", "MatMulIntegerToFloat"}
    assert json.loads(json.dumps(found.facts()))["shape"] == {"batch": 2, "tokens": 3, "past": 0}


def test_node_times_carry_what_nodes_read_and_wrote(tmp_path: Path) -> None:
    path = saved(tmp_path, MODEL) / "model.onnx"
    times = node_times(path, {"input_ids": np.zeros((2, 3), dtype=np.int64)}, runs=1, threads=1)
    rounded = next(entry for entry in times if entry.kernel == "QuantizeLinear")
    assert rounded.inputs[0] == floats(2, 3, 64)
    assert rounded.outputs == (Operand("uint8", (2, 3, 64)),)


def test_a_decoder_runs_behind_its_cache_and_an_encoder_has_none(tmp_path: Path) -> None:
    (tmp_path / "decoder").mkdir()
    timed = latency(saved(tmp_path / "decoder", DECODER), Shape(2, 1, past=5), threads=1, runs=2)
    assert str(timed.shape) == "2x1 behind 5"
    assert timed.seconds[0] <= timed.seconds[1] <= timed.seconds[2] <= timed.seconds[3]
    with pytest.raises(SourceError, match="it keeps no cache"):
        latency(saved(tmp_path, MODEL), Shape(1, 4, past=5))


def test_what_cannot_be_timed_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'8' is no shape; give BATCHxTOKENS"):
        parse_shape("8")
    with pytest.raises(SourceError, match="there is no model"):
        latency(tmp_path, Shape(1, 4))
    other = saved(tmp_path, MODEL.replace("input_ids", "pixels"))
    with pytest.raises(SourceError, match="tokens cannot fill its inputs pixels"):
        latency(other, Shape(1, 4))


def test_ceilings_are_measured_once_and_again_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEFOLD_CACHE", str(tmp_path))
    for name, value in (("SIZES", ((8, 16, 16),)), ("MEMORY_BYTES", 2**16), ("CACHE_BYTES", 2**12), ("TURNS", 2)):
        monkeypatch.setattr(ceilings, name, value)
    first = ceilings.ceilings(1)
    assert all(math.isfinite(value) and value > 0 for value in vars(first).values())
    assert ceilings.ceilings(1) == first
    place = machine.figures_file("ceilings", 1)
    assert place.parent == tmp_path
    machine.keep("ceilings", 1, {**vars(first), "node": 5.0})
    assert ceilings.ceilings(1).node == 5.0
    assert ceilings.ceilings(1, fresh=True).node != 5.0
    place.write_text("broken")
    assert ceilings.ceilings(1).node > 0


def test_the_command_prints_the_table_or_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCALEFOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(ceilings, "measure", lambda threads: BEST)
    arguments = ["bench", str(saved(tmp_path, MODEL)), "--shape", "2x3", "--threads", "1", "--runs", "2", "--profile"]
    cli.app(arguments, standalone_mode=False)
    shown = capsys.readouterr().out
    assert "between nodes" in shown and "100 integer and 50 float GOPS" in shown
    cli.app([*arguments, "--json"], standalone_mode=False)
    facts = json.loads(capsys.readouterr().out)
    assert facts["latencies"][0]["runs"] == 2
    assert facts["profiles"][0]["ceilings"]["integer"] == 100e9


def test_a_layer_is_found_by_the_names_that_fused_nodes_are_made_of() -> None:
    names = {"encoder.0.dense"}
    assert bench._layer_of("encoder.0.dense/MatMulAddFusion", names) == "encoder.0.dense"
    assert bench._layer_of("encoder.0.dense.input_q", names) == "encoder.0.dense"
    assert bench._layer_of("node_gelu_3", names) == ""
