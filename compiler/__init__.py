"""scalefold: from a float transformer to an ONNX graph that runs on onnxruntime's integer CPU kernels, with proof."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalefold.compiler.diff import Diff, diff_models
    from scalefold.compiler.driver import CompileReport, compile_model
    from scalefold.compiler.errors import ScalefoldError
    from scalefold.compiler.fusing import FuseReport, fuse_folder
    from scalefold.compiler.recipe import Recipe, load_recipe, named_recipes
    from scalefold.compiler.serving import AdapterSession, load, write_overridable
    from scalefold.compiler.transformers_quantizer import ScalefoldQuantizer

__all__ = [
    "AdapterSession", "CompileReport", "Diff", "FuseReport", "Recipe", "ScalefoldError", "ScalefoldQuantizer",
    "compile_model", "diff_models", "fuse_folder", "load", "load_recipe", "named_recipes", "write_overridable",
]  # fmt: skip

HOMES = {
    "diff": ("Diff", "diff_models"),
    "driver": ("CompileReport", "compile_model"),
    "errors": ("ScalefoldError",),
    "fusing": ("FuseReport", "fuse_folder"),
    "recipe": ("Recipe", "load_recipe", "named_recipes"),
    "serving": ("AdapterSession", "load", "write_overridable"),
    "transformers_quantizer": ("ScalefoldQuantizer",),
}
"""The modules that names live in: imported on first use, for the pytest plug-in is loaded by every test run."""


def __getattr__(name: str) -> Any:
    for module, names in HOMES.items():
        if name in names:
            return getattr(import_module(f"scalefold.compiler.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
