from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from scalefold.compiler import artifact
from scalefold.compiler.decoder import LOGITS, decoder_of
from scalefold.compiler.errors import SourceError
from scalefold.compiler.generate import CachedSession
from scalefold.compiler.last_logits import KEPT, cut_logits, output_layer_input
from scalefold.compiler.runtime import Message, Session
from scalefold.compiler.testing import assert_same_graph, parse

HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 2] h, float[b, 1, p, 2] "past_key_values.0.key")
    => (float[b, n, 3] logits, float[b, 1, p, 2] "present.0.key")
<float[2, 3] w = {1.0, 2.0, 5.0, 3.0, 4.0, 6.0}, float[2, 2] u = {1.0, 2.0, 3.0, 4.0}, float[3] c = {0.5, 1.0, 2.0},
 int64[1] end = {9223372036854775807}, int64[1] axis = {1} KEPT>
{ "present.0.key" = Identity("past_key_values.0.key")  i = MatMul(h, u)  x = Tanh(i)
"""
BEFORE = HEAD.replace("KEPT", "")
OPTIONAL = '"past_key_values.0.key", int64[1] logits_to_keep)'
AFTER = HEAD.replace("KEPT", ", int64[1] logits_to_keep = {9223372036854775807}").replace(
    '"past_key_values.0.key")', OPTIONAL, 1
)


def test_the_output_layer_reads_the_last_tokens() -> None:
    model = parse(BEFORE + "y = MatMul(x, w)  logits = Add(y, c) }")
    after = AFTER + "z = Neg(logits_to_keep)  r = Slice(x, z, end, axis)  y = MatMul(r, w)  logits = Add(y, c) }"
    message = cut(model)
    onnx.checker.check_model(message)
    assert_same_graph(ir.from_proto(message), parse(after))


def cut(model: ir.Model) -> onnx.ModelProto:
    """A model with its logits cut, as a message."""
    name, message = output_layer_input(model), ir.to_proto(model)
    assert name is not None and isinstance(message, onnx.ModelProto)
    assert cut_logits(message, name)
    return message


@pytest.mark.parametrize(
    "body",
    [
        BEFORE.replace("=> (", "=> (float[b, s, 2] t, ") + "y = MatMul(x, w)  logits = Add(y, c)  t = Exp(x) }",
        BEFORE.replace("i = MatMul(h, u)", "i = Exp(h)") + "y = Concat<axis = 2>(x, x, x, x) logits = Relu(y) }",
        BEFORE.replace("past_key_values.0.key", "before").replace("present.0.key", "after")
        + "y = MatMul(x, w)  logits = Add(y, c) }",
        AFTER + "y = MatMul(x, w)  z = Add(y, c)  logits = Slice(z, logits_to_keep, end, axis) }",
    ],
    ids=["what it reads makes another output", "no product makes the logits", "no cache", "cut already"],
)
def test_what_cannot_be_cut_is_left(body: str) -> None:
    assert output_layer_input(parse(body)) is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_gives_as_many_logits_as_are_asked_for(
    decoder_models: dict[str, ir.Model], tmp_path: Path, family: str
) -> None:
    model = decoder_models[family]
    feed = decoder_of(model).prompt_feed(np.arange(10).reshape(2, 5) + 7)
    wanted = Session(model).run(feed)
    artifact.save_model(model.clone(), tmp_path)
    saved = ir.load(tmp_path / artifact.MODEL)
    session = Session(Message(cut(saved).SerializeToString(), tmp_path))
    assert all(np.array_equal(wanted[name], found) for name, found in session.run(feed).items())
    raw: onnxruntime.InferenceSession = session._session
    assert KEPT not in {entry.name for entry in raw.get_inputs()}
    for count in (1, 3, 9):
        logits = raw.run([LOGITS], {**feed, KEPT: np.array([count])})[0]
        assert np.array_equal(logits, wanted[LOGITS][:, -count:])


def test_generation_asks_for_the_last_logits_alone(decoder_models: dict[str, ir.Model], tmp_path: Path) -> None:
    model = decoder_models["llama"].clone()
    artifact.save_model(model, tmp_path)
    artifact.write_json(tmp_path / artifact.RECORD, {"output_layer_input": output_layer_input(model)})
    session = CachedSession(tmp_path / artifact.MODEL)
    ids, cache = np.arange(10).reshape(2, 5) + 7, session.hold(session.decoder.empty_cache(2))
    every, _ = session.step(ids, None, cache)
    last, grown = session.step(ids, None, cache, last=True)
    assert last.shape == (2, 1, 200) and np.array_equal(last, every[:, -1:])
    assert {value.shape()[2] for value in grown.values()} == {5}
    plain = CachedSession(tmp_path / artifact.MODEL, as_it_is=True)
    assert np.array_equal(plain.step(ids, None, cache, last=True)[0], last)

    artifact.write_json(tmp_path / artifact.RECORD, {"output_layer_input": "of another file"})
    other = CachedSession(tmp_path / artifact.MODEL)
    assert np.array_equal(other.step(ids, None, cache, last=True)[0], last)
    (tmp_path / artifact.MODEL).write_bytes(b"no model")
    with pytest.raises(SourceError, match="it is not an ONNX model"):
        CachedSession(tmp_path / artifact.MODEL)
    (tmp_path / artifact.MODEL).unlink()
    with pytest.raises(SourceError, match="there is no such file"):
        CachedSession(tmp_path / artifact.MODEL)
