"""Quantization as part of an export by transformers: `OnnxConfig(quantizer=ScalefoldQuantizer("w8a8", ...))`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers import CalibrationSet, ExportQuantizer
from transformers.exporters.utils import onnx_feed

from scalefold.compiler import artifact
from scalefold.compiler.driver import compile_model
from scalefold.compiler.recipe import Recipe, Target


class ScalefoldQuantizer(ExportQuantizer):  # type: ignore[misc]
    """Compile the model that transformers' ONNX exporter made, as `scalefold compile` does with the float ONNX file.

    Works in `OnnxExporter.export` and `export_for_generation`, which compiles each of its graphs:

    ```python
    quantizer = ScalefoldQuantizer("w8a8", calibration_dataset=samples)
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True, quantizer=quantizer))
    exported.save_pretrained("out")
    ```

    Args:
        recipe: a named recipe, a YAML file, or a `Recipe`.
        calibration_dataset: input dictionaries of the model, or of `generate` for `export_for_generation`; the export's own
            sample inputs when None.
        samples: overrides the recipe's number of samples.
        target: overrides the recipe's.
        include: regular expressions of layers to quantize, besides the recipe's; all layers when there are none.
        exclude: regular expressions of layers to leave in float, besides the recipe's.
        allow_float: regular expressions of layers that may miss their integer kernel.
    """

    supported_formats = (ExportFormat.ONNX,)
    required_packages = ("onnx", "onnx_ir", "onnxruntime")
    min_versions: Mapping[str, str] = {"onnxruntime": "1.24.1"}

    def __init__(
        self,
        recipe: str | Path | Recipe = "w8a8",
        calibration_dataset: Iterable[Mapping[str, Any]] | None = None,
        *,
        samples: int | None = None,
        target: Target | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        allow_float: Sequence[str] = (),
    ) -> None:
        super().__init__(calibration_dataset)
        self.recipe = recipe
        self.samples = samples
        self.target = target
        self.include = include
        self.exclude = exclude
        self.allow_float = allow_float

    def quantize(self, model: ir.Model, sample_inputs: dict[str, Any], export_format: ExportFormat) -> ir.Model:
        """The compiled model, its weights in memory.

        Args:
            model: the float model.
            sample_inputs: what the model was traced with.
            export_format: ONNX; the exporter checks it.

        Raises:
            ScalefoldError: one sentence that says what is wrong, where, and what would help.
        """
        names = [value.name for value in model.graph.inputs if not value.is_initializer()]
        feeds = CalibrationSet(self.calibration_dataset, sample_inputs, lambda sample: onnx_feed(names, sample))
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "compiled"
            compile_model(
                model,
                output,
                recipe=self.recipe,
                calibration=feeds,
                samples=self.samples,
                target=self.target,
                include=self.include,
                exclude=self.exclude,
                allow_float=self.allow_float,
            )
            compiled = ir.load(output / artifact.MODEL)
            return ir.external_data.load_to_model(compiled)
