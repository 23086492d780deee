"""Recipes: what to do to a model, as a file people can read, compare and pass on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalefold.compiler.errors import RecipeError

Target = Literal["onnxruntime-cpu", "qdq"]
Granularity = Literal["per-tensor", "per-token"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weights(_Section):
    """Weights of linear layers: int8 container, symmetric, one scale per output column."""

    bits: int = Field(8, ge=2, le=8, description="bits per weight, in an 8-bit container")


class Activations(_Section):
    """Inputs of linear layers: uint8 container; asymmetric; per tensor static, per token dynamic."""

    bits: int = Field(8, ge=2, le=8, description="bits per activation, in an 8-bit container")
    granularity: Granularity = Field("per-tensor", description="what has a scale: the tensor, or each token (row)")
    per_token: tuple[str, ...] = Field((), description="regular expressions of layers that are per token in any case")
    clipping: float = Field(
        0.0, ge=0, lt=1, description="largest share of tokens that clipping of static ranges may cut; 0 keeps min-max"
    )
    clipping_refine: bool = Field(True, description="let each activation then try a few clipping ratios of its own")
    clipping_step: float = Field(0.01, gt=0, lt=1, description="step of the clipping search")


class Embeddings(_Section):
    """Embedding tables: int8 container, symmetric, one scale per row."""

    bits: int = Field(8, ge=2, le=8, description="bits per entry, in an 8-bit container")


class Migration(_Section):
    """Outlier Suppression+ where channels of linear layers' inputs can be shifted and scaled without a trace."""

    shift: bool = Field(True, description="centre each channel")
    scale: bool = Field(True, description="search one threshold and scale down the channels above it")
    grid: int = Field(100, ge=2, description="fewest thresholds on the search grid")
    stride: int = Field(8, ge=1, description="first try every n-th threshold, then all around the best; 1 tries all")
    norm: bool = Field(
        True, description="migrate behind LayerNormalization (shift, scale) and RMSNormalization (scale)"
    )
    linear: bool = Field(True, description="migrate between two linear layers with nothing between (shift and scale)")
    value: bool = Field(False, description="migrate from the values of attention to its output layer (shift and scale)")
    relu: bool = Field(False, description="migrate through a Relu, from one linear layer to the next (scale)")
    gate: bool = Field(False, description="migrate through a gated unit, from its up layer to its down layer (scale)")


class Prefix(_Section):
    """A token in front of every sequence of a decoder, kept in the graph as constants, where it calms the others."""

    candidates: int = Field(16, ge=1, description="how many of the most frequent tokens are tried")
    reduction: float = Field(
        4.0,
        gt=1,
        description="by what factor the largest input of a linear layer must fall for a prefix to be baked in",
    )


class Exceptions(_Section):
    """Ranges per token for the few activations of a decoder that no static range holds, chosen by measurement."""

    divergence: float = Field(
        0.02, gt=0, description="divergence of the logits from float, in nats per token, that is good enough"
    )
    per_token_share: float = Field(
        0.25, ge=0, le=1, description="largest share of the linear multiply-adds that may get a range per token"
    )


class CalibrationOptions(_Section):
    """How much calibration data is used."""

    samples: int = Field(128, ge=1, description="samples for activation ranges")
    search_samples: int = Field(16, ge=1, description="samples, of those, for searches")
    max_length: int = Field(128, ge=2, description="tokens per sample of text")
    window: int = Field(
        512, ge=2, description="tokens per sample for a decoder, which gets as many samples less as they are longer"
    )


class Recipe(_Section):
    """A whole recipe; a section that is left out, or null, is not done at all."""

    name: str = "unnamed"
    summary: str = ""
    pipeline: str = Field("scalefold.passes:pipeline", description="function from a recipe to its passes")
    weights: Weights = Weights()
    activations: Activations = Activations()
    embeddings: Embeddings | None = None
    prefix: Prefix | None = None
    migration: Migration | None = None
    exceptions: Exceptions | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    target: Target = "onnxruntime-cpu"
    include: tuple[str, ...] = Field((), description="regular expressions of layers to quantize; empty means all")
    exclude: tuple[str, ...] = Field((), description="regular expressions of layers to leave in float")


def named_recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    folder = Path(str(files("scalefold.passes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path | Recipe) -> Recipe:
    """Read a recipe by name, from a YAML file, or as it is.

    Raises:
        RecipeError: with every fault found, not only the first.
    """
    if isinstance(source, Recipe):
        return source
    named = named_recipes()
    path = named.get(str(source), Path(source))
    if not path.is_file():
        raise RecipeError(
            [f"there is no recipe of this name and no such file; named are {', '.join(named)}"], where=str(source)
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError([f"not YAML ({' '.join(str(error).split())})"], where=str(path)) from error
    if not isinstance(content, dict):
        raise RecipeError(["not a mapping of keys to values"], where=str(path))
    try:
        return Recipe.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise RecipeError([_fault(dict(entry)) for entry in error.errors()], where=str(path)) from error


def _fault(entry: dict[str, object]) -> str:
    location = entry["loc"]
    assert isinstance(location, tuple)
    key = ".".join(str(part) for part in location)
    if entry["type"] == "extra_forbidden":
        return f"{key}: no such key"
    return f"{key}: {str(entry['msg'])[:1].lower()}{str(entry['msg'])[1:]}, got {entry['input']!r}"
