from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import gates
from scalefold.compiler.decoder import decoder_of
from scalefold.compiler.errors import KernelError
from scalefold.compiler.gates import Gate, batch_invariance, cache_parity, no_saturation, require_gates, run_gates
from scalefold.compiler.runtime import Feed, Session

DECLARED = '<ir_version: 10, opset_import: ["" : 20]>\n'
EMBEDDED = (
    "model (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, s, 2] y)"
    "<float[9, 2] table = {0.1, 0.2, 5.5, 0.4, -0.3, 0.7, 1.9, 0.2, 0.8, -9.3, 3.3, 0.1, 0.2, 0.6, 0.9, 0.5, 0.3, 0.1}>"
)
EVERY_ROW_ALONE = DECLARED + EMBEDDED + "{ y = Gather(table, input_ids) }"
RANGE_OF_THE_BATCH = (
    DECLARED
    + EMBEDDED
    + "{ x = Gather(table, input_ids)  q, s, z = DynamicQuantizeLinear(x)  y = DequantizeLinear(q, s, z) }"
)
TOKENS: Feed = {"input_ids": np.array([[0, 2, 3, 8]]), "attention_mask": np.ones((1, 4), dtype=np.int64)}


def weight(codes: str) -> ir.Model:
    return ir.from_onnx_text(
        DECLARED
        + f"model (float[b, 2] x) => (float[b, 2] y)<int8[2, 2] codes = {{{codes}}}, float[2] scales = {{1, 1}}>"
        "{ w = DequantizeLinear<axis = 1>(codes, scales)  y = MatMul(x, w) }"
    )


def test_pairs_that_fit_16_bits_pass() -> None:
    gate = no_saturation(weight("100, 5, 28, -127"))
    assert gate.passed and gate.figure == 0


def test_pairs_that_do_not_fit_are_counted_and_named() -> None:
    gate = no_saturation(weight("100, -100, 29, -100"))
    assert not gate.passed and gate.figure == 2 and "codes" in gate.detail


def test_rows_that_do_not_see_each_other_are_invariant() -> None:
    model = ir.from_onnx_text(EVERY_ROW_ALONE)
    assert [gate.passed for gate in batch_invariance(Session(model), TOKENS)] == [True]


def test_a_range_of_the_whole_batch_is_found_out() -> None:
    gates = batch_invariance(Session(ir.from_onnx_text(RANGE_OF_THE_BATCH)), TOKENS)
    assert [gate.passed for gate in gates] == [False]


def test_a_sample_as_long_as_the_position_table_leaves_room_for_a_batch(decoder_models: dict[str, ir.Model]) -> None:
    model = decoder_models["gpt2"]  # of 64 positions
    ids = np.random.default_rng(1).integers(5, 200, (1, 64))
    gates = run_gates(model, Session(model), decoder_of(model).prompt_feed(ids), rounds_rows=False)
    assert len(gates) == 4 and all(gate.passed for gate in gates)


@pytest.mark.parametrize(
    "inputs",
    [
        "int64[1, 8] input_ids, int64[1, 8] attention_mask",
        "int64[b, 8] input_ids, int64[b, 8] attention_mask",
        "int64[b, s] input_ids, int64[b, s] attention_mask, int64[b, s, 4] bbox",
    ],
)
def test_what_takes_no_batch_of_other_lengths_is_not_given_one(inputs: str) -> None:
    text = EVERY_ROW_ALONE.replace("int64[b, s] input_ids, int64[b, s] attention_mask", inputs)
    model = ir.from_onnx_text(text)
    feed: Feed = {"input_ids": np.ones((1, 8), np.int64), "attention_mask": np.ones((1, 8), np.int64)}
    feed = {**feed, "bbox": np.ones((1, 8, 4), np.int64)} if "bbox" in inputs else feed
    assert [gate.name for gate in run_gates(model, Session(model), feed, rounds_rows=False)] == ["no saturation"]


def test_positions_and_types_go_on_in_a_batch() -> None:
    declared = EMBEDDED.replace(
        "attention_mask", "attention_mask, int64[b, s] position_ids, int64[b, s] token_type_ids"
    )
    added = "{ p = Add(position_ids, token_type_ids)  n = Add(p, input_ids)  y = Gather(table, n) }"
    feed: Feed = {
        "input_ids": np.zeros((1, 4), np.int64),
        "attention_mask": np.ones((1, 4), np.int64),
        "position_ids": np.arange(4)[None],
        "token_type_ids": np.array([[0, 0, 1, 1]]),
    }
    assert [
        gate.passed for gate in batch_invariance(Session(ir.from_onnx_text(DECLARED + declared + added)), feed)
    ] == [True]


def test_a_decoder_without_a_mask_is_not_padded(decoder_models: dict[str, ir.Model]) -> None:
    model = decoder_models["gpt2"].clone()
    decoder = decoder_of(model)
    feed = decoder.prompt_feed(np.arange(5, 17)[None])
    without = replace(
        decoder, tokens={name: dtype for name, dtype in decoder.tokens.items() if name != "attention_mask"}
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gates, "decoder_of", lambda _: without)
        patched.setattr(gates, "cache_parity", lambda *_: Gate("cache parity", True, 0, 1, ""))
        found = run_gates(model, Session(model), feed, rounds_rows=False)
    assert [gate.name for gate in found] == ["no saturation", "cache parity"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_float_decoder_passes_every_gate(decoder_models: dict[str, ir.Model], family: str) -> None:
    model = decoder_models[family]
    ids = np.random.default_rng(1).integers(5, 200, (1, 12))
    gates = run_gates(model, Session(model), decoder_of(model).prompt_feed(ids), rounds_rows=False)
    assert [gate.name for gate in gates if gate.passed] == [
        "no saturation",
        "cache parity",
        "batch invariance, padded right",
        "batch invariance, padded left",
    ]


def test_a_cache_that_is_ignored_is_found_out(decoder_models: dict[str, ir.Model]) -> None:
    model = decoder_models["gpt2"].clone()
    names = [value.name or "" for value in model.graph.outputs if "values" in (value.name or "")]
    for name in names:  # the cache that goes out is not what was attended to
        index = [value.name for value in model.graph.outputs].index(name)
        twisted = ir.node("Neg", [model.graph.outputs[index]])
        model.graph.append(twisted)
        twisted.outputs[0].type, twisted.outputs[0].shape = (
            model.graph.outputs[index].type,
            model.graph.outputs[index].shape,
        )
        model.graph.outputs[index].name = f"{name}_before"
        twisted.outputs[0].name = name
        model.graph.outputs[index] = twisted.outputs[0]
    decoder = decoder_of(model)
    assert not cache_parity(Session(model), decoder, np.arange(5, 17)[None]).passed


def test_a_gate_that_does_not_hold_is_an_error_with_its_figure(tmp_path: Path) -> None:
    failed = Gate("no saturation", False, 3, 0, "columns of weights that can saturate int16, first in layer.0")
    with pytest.raises(KernelError, match=r"no saturation does not hold: columns of weights .* first in layer.0, 3"):
        require_gates([failed, failed], str(tmp_path))
    require_gates([Gate("cache parity", True, 1e-5, 1e-3, "")], str(tmp_path))
