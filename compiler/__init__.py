"""scalefold: from a float transformer to an ONNX graph that runs on onnxruntime's integer CPU kernels, with proof."""

from __future__ import annotations

from scalefold.compiler.driver import CompileReport, compile_model
from scalefold.compiler.errors import ScalefoldError
from scalefold.compiler.recipe import Recipe, load_recipe, named_recipes

__all__ = ["CompileReport", "Recipe", "ScalefoldError", "compile_model", "load_recipe", "named_recipes"]
