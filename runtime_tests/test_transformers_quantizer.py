"""ScalefoldQuantizer: transformers' exporter gives what the compiler gives."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalefold.compiler import ScalefoldError, compile_model, graph
from scalefold.compiler.diff import diff_files
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.transformers_quantizer import ScalefoldQuantizer


def tensors(feeds: list[Feed]) -> list[dict[str, Any]]:
    import torch

    return [{name: torch.from_numpy(np.asarray(array)) for name, array in feed.items()} for feed in feeds]


def exported(model: Any, quantizer: ScalefoldQuantizer) -> Any:
    """The tiny BERT through transformers' exporter, with the shapes that `scalefold compile` exports it with."""
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter

    ids = torch.arange(16).reshape(2, 8)
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=64)}
    config = OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(inputs, sizes), quantizer=quantizer)
    return OnnxExporter().export(model, inputs, config=config)


def test_the_exporter_gives_the_graph_and_the_weights_of_the_compiler(
    tiny_model: Any, source_folder: Path, feeds: list[Feed], tmp_path: Path
) -> None:
    from transformers.exporters import ExportedModel

    quantizer = ScalefoldQuantizer(
        "w8a8-naive", calibration_dataset=tensors(feeds[:24]), samples=8, exclude=[r"output\.dense"]
    )
    exported(tiny_model, quantizer).save_pretrained(tmp_path / "exported")
    compile_model(
        source_folder,
        tmp_path / "compiled",
        recipe="w8a8-naive",
        calibration=feeds[:24],
        samples=8,
        exclude=[r"output\.dense"],
    )
    difference = diff_files(tmp_path / "exported", tmp_path / "compiled")
    assert difference.equal, difference.summary()
    name = "model.onnx.data"
    assert filecmp.cmp(tmp_path / "exported" / name, tmp_path / "compiled" / name, shallow=False)
    (sample,) = tensors(feeds[30:31])
    got = ExportedModel.from_pretrained(tmp_path / "exported")(**sample)
    wanted = Session(tmp_path / "compiled" / "model.onnx").run(feeds[30])
    np.testing.assert_array_equal(got["last_hidden_state"].numpy(), wanted["last_hidden_state"])


def test_a_fault_is_told_in_one_sentence(float_model: Path) -> None:
    quantizer = ScalefoldQuantizer("nonsense", calibration_dataset=[{}])
    with pytest.raises(ScalefoldError, match="there is no recipe of this name"):
        quantizer.quantize(read_onnx(float_model), {}, quantizer.supported_formats[0])


def test_other_formats_are_refused() -> None:
    from transformers.exporters import OpenVINOConfig

    with pytest.raises(ValueError, match="ScalefoldQuantizer quantizes onnx exports, not openvino ones"):
        ScalefoldQuantizer().validate_environment(OpenVINOConfig.export_format)


@pytest.mark.slow
def test_every_graph_of_a_generating_model_is_compiled() -> None:
    import torch
    import transformers as hf
    from transformers.exporters import OnnxConfig, OnnxExporter

    torch.manual_seed(5)
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=200, n_positions=64, bos_token_id=1, eos_token_id=2)
    ).eval()
    generator = np.random.default_rng(0)
    samples = tensors([{"input_ids": generator.integers(3, 200, (1, length))} for length in range(6, 14)])
    quantizer = ScalefoldQuantizer("w8a8-naive", calibration_dataset=samples, samples=6)
    inputs = {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    found = OnnxExporter().export_for_generation(model, inputs, config=OnnxConfig(dynamic=True, quantizer=quantizer))
    kernels = {name: len(graph.nodes(part.program, "MatMulIntegerToFloat")) for name, part in found.components.items()}
    assert kernels == {"prefill": 5, "decode": 5}
    feed = {"input_ids": inputs["input_ids"].numpy(), "position_ids": np.arange(5)[None].repeat(2, 0)}
    logits = Session(found.components["prefill"].program).run(feed)["logits"]
    with torch.no_grad():
        wanted = model(**inputs).logits.numpy()[:, -logits.shape[1] :]
    assert np.abs(logits - wanted).max() < 0.05 * np.abs(wanted).max()
