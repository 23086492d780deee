"""Recipes: what to do to a model, as a file people can read, compare and pass on."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from scalefold.compiler.errors import RecipeError
from scalefold.compiler.layer_names import matches

Target = Literal["onnxruntime-cpu", "qdq"]
Granularity = Literal["per-tensor", "per-token"]
Profile = Literal["throughput", "decode", "balanced"]
Format = Literal["linear", "kmeans", "bcq"]
Solver = Literal["rtn", "mse", "hqq", "lloyd", "exact", "greedy", "alternating"]
CodebookOf = Literal["tensor", "column"]
Weighting = Literal["none", "hessian"]

SOLVERS: dict[Format, tuple[Solver, ...]] = {
    "linear": ("rtn", "mse", "hqq"),
    "kmeans": ("lloyd", "exact"),
    "bcq": ("alternating", "greedy"),
}
"""The solvers of each format."""


GROUPED_BITS = 6
"""Most bits of linear codes in groups: their integers are codes times a step, within int8."""

EXACT_BITS = 6
"""Most bits that exact k-means is offered for."""

COMBINATION = "combination"
"""The type of a fault that lies in values together, not in one."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightFormat(_Section):
    """How one weight is stored and how its codes are found; whatever the format, the kernel sees int8 per column."""

    format: Format = Field("linear", description="evenly spaced levels, a codebook, or sums of signed alphas")
    bits: int = Field(8, ge=1, le=8, description="bits per weight on disk")
    group_size: int | None = Field(
        None, ge=2, description="rows of a column that share a grid (linear) or alphas (bcq); null for all of them"
    )
    symmetric: bool = Field(True, description="linear: levels symmetric about 0, without an offset per column or group")
    codebook: CodebookOf = Field("tensor", description="kmeans: what has a codebook, the weight or each column")
    solver: Solver | None = Field(
        None, description="linear: rtn, mse, hqq; kmeans: lloyd, exact; bcq: alternating, greedy; null for the best"
    )
    weighting: Weighting = Field("none", description="kmeans: hessian weights each row by its input's mean square")
    compensation: bool = Field(False, description="let the rows still to come make up for each row's error (GPTQ)")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        faults = []
        if self.solver is not None and self.solver not in SOLVERS[self.format]:
            known = ", ".join(SOLVERS[self.format])
            faults.append(f"solver {self.solver} is not one of format {self.format}, which has {known}")
        if self.group_size is not None and self.format == "kmeans":
            faults.append("group_size is for linear and bcq: a codebook is of a tensor or a column")
        if self.weighting == "hessian" and self.format != "kmeans":
            faults.append("weighting is for kmeans; use compensation")
        if self.group_size is not None and self.format == "linear" and self.bits > GROUPED_BITS:
            faults.append(
                f"int8 has no room for a step per group of {self.bits}-bit codes, only of up to {GROUPED_BITS}"
            )
        if self.solver == "exact" and self.bits > EXACT_BITS:
            faults.append(f"solver exact takes too long above {EXACT_BITS} bits")
        if self.solver == "hqq" and (self.symmetric or self.bits == 8):
            faults.append("solver hqq moves the zero point: it needs symmetric: false, and fewer than 8 bits")
        if faults:
            raise PydanticCustomError(COMBINATION, "{faults}", {"faults": "; ".join(faults)})
        return self

    @property
    def chosen_solver(self) -> Solver:
        """The solver, or the format's best: linear by round-to-nearest at 8 bits and by squared error below."""
        if self.solver is not None:
            return self.solver
        return "mse" if self.format == "linear" and self.bits < 8 else SOLVERS[self.format][0]

    @property
    def needs_hessian(self) -> bool:
        """Whether the solver looks at what the layer is fed."""
        return self.compensation or self.weighting == "hessian"

    def __str__(self) -> str:
        if self.format == "linear":
            parts = [f"int{self.bits}", "" if self.symmetric else "asymmetric"]
        else:
            parts = [f"{self.bits}-bit {self.format}"]
        grain = f"per {self.codebook}" if self.format == "kmeans" else "per column"
        parts.append(grain if self.group_size is None else f"in groups of {self.group_size}")
        return " ".join(part for part in parts if part)


class WeightOverride(_Section):
    """What is different for the layers of a pattern; keys that are left out are as in the section above.

    Another format starts from its own defaults, but for the bits.
    """

    format: Format = "linear"
    bits: int = Field(8, ge=1, le=8)
    group_size: int | None = Field(None, ge=2)
    symmetric: bool = True
    codebook: CodebookOf = "tensor"
    solver: Solver | None = None
    weighting: Weighting = "none"
    compensation: bool = False

    @model_serializer(mode="wrap")
    def _given(self, serialize: Callable[[Self], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key in self.model_fields_set}

    def apply(self, base: WeightFormat) -> WeightFormat:
        """`base` with these changes."""
        given = self.model_dump()
        kept = base.model_dump()
        if given.get("format", base.format) != base.format:
            kept = {"bits": base.bits}
        return WeightFormat.model_validate(kept | given)


class Weights(WeightFormat):
    """Weights of linear layers."""

    packed: bool = Field(
        True, description="store codes at their width; false keeps each in 8 bits, ready for the kernel"
    )
    layers: dict[str, WeightOverride] = Field(
        {}, description="by regular expressions of layer names, what is different there; the last that matches counts"
    )

    @model_validator(mode="after")
    def _overrides_fit(self) -> Self:
        faults = []
        for pattern, override in self.layers.items():
            try:
                override.apply(self.base)
            except ValidationError as error:
                faults += [f"layers.{pattern}: {entry['msg']}" for entry in error.errors()]
        if faults:
            raise PydanticCustomError(COMBINATION, "{faults}", {"faults": "; ".join(faults)})
        return self

    @property
    def base(self) -> WeightFormat:
        """The format of the layers that no pattern names."""
        return WeightFormat.model_validate(self.model_dump(include=set(WeightFormat.model_fields)))

    def of(self, layer: str) -> WeightFormat:
        """The format of one layer: the last pattern that matches its name counts, and no other."""
        for pattern, override in reversed(self.layers.items()):
            if matches(pattern, layer):
                return override.apply(self.base)
        return self.base


class Activations(_Section):
    """Inputs of linear layers: uint8 container; asymmetric; per tensor static, per token dynamic."""

    bits: int = Field(8, ge=2, le=8, description="bits per activation, in an 8-bit container")
    granularity: Granularity = Field("per-tensor", description="what has a scale: the tensor, or each token (row)")
    per_token: tuple[str, ...] = Field((), description="regular expressions of layers that are per token in any case")
    clipping: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="largest share of tokens that the ratio of all ranges may cut; 0 keeps min-max",
    )
    clipping_refine: bool = Field(True, description="let each activation then try a few clipping ratios of its own")
    clipping_step: float = Field(0.01, gt=0, lt=1, description="step of the clipping search")


class Embeddings(_Section):
    """Embedding tables: symmetric, one scale per row; at 8 bits int8 itself, below that what decodes to it."""

    bits: int = Field(8, ge=2, le=8, description="bits per entry on disk")
    format: Format = Field("linear", description="evenly spaced levels, a codebook, or sums of signed alphas")
    group_size: int | None = Field(None, ge=2, description="entries of a row that share a grid or alphas; null for all")

    @property
    def weight(self) -> WeightFormat:
        """The format of the table's transpose, whose columns are the rows."""
        return WeightFormat(format=self.format, bits=self.bits, group_size=self.group_size)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        try:
            _ = self.weight
        except ValidationError as error:
            raise PydanticCustomError(COMBINATION, "{faults}", {"faults": error.errors()[0]["msg"]}) from error
        return self


class Cache(_Section):
    """Keys and values of a decoder between steps: static, asymmetric, one scale per layer for keys and one for values."""

    bits: Literal[8] = Field(8, description="bits per number; the cache that goes in and out is uint8")


class AttentionForm(_Section):
    """Attention of a decoder with grouped queries (Llama) in a form that adds up in one order however tokens are fed."""

    invariant: Literal[True] = Field(
        True, description="the same bits at once, one by one, padded and in a batch; prompts and steps take longer"
    )


class Migration(_Section):
    """Outlier Suppression+ where channels of linear layers' inputs can be shifted and scaled without a trace."""

    shift: bool = Field(True, description="centre each channel")
    scale: bool = Field(True, description="search one threshold and scale down the channels above it")
    grid: int = Field(100, ge=2, description="fewest thresholds on the search grid")
    stride: int = Field(8, ge=1, description="first try every n-th threshold, then close in on the best; 1 tries all")
    norm: bool = Field(
        True, description="migrate behind LayerNormalization (shift, scale) and RMSNormalization (scale)"
    )
    linear: bool = Field(True, description="migrate between two linear layers with nothing between (shift and scale)")
    value: bool = Field(False, description="migrate from the values of attention to its output layer (shift and scale)")
    relu: bool = Field(False, description="migrate through a Relu, from one linear layer to the next (scale)")
    gate: bool = Field(False, description="migrate through a gated unit, from its up layer to its down layer (scale)")


class Learning(_Section):
    """Quadapter: scales of channels learned by gradients where they can be folded away; needs the extra `hf` (torch)."""

    steps: int = Field(192, ge=0, description="steps for each transformer block; 0 leaves the blocks out")
    rate: float = Field(0.2, gt=0, description="learning rate for blocks")
    end_to_end_steps: int = Field(128, ge=0, description="steps for the whole model; 0 leaves them out")
    end_to_end_rate: float = Field(0.003, gt=0, description="learning rate for the whole model")
    decay: Literal["cosine", "linear"] = Field("cosine", description="how the rates fall to 0")
    objective: Literal["task", "float"] = Field(
        "task", description="end to end: the next token (decoders), or the float model's outputs"
    )
    ranges: bool = Field(False, description="end to end: learn the static range of every activation too")
    held_out: float = Field(0.25, gt=0, lt=1, description="share of the search samples that only judge")
    patience: int = Field(3, ge=1, description="judgements, of eight, without a better loss before learning stops")
    seed: int = Field(0, ge=0, description="of the order of samples")
    checkpoint: str = Field("", description="folder from which an interrupted run goes on; empty keeps no state")
    norm: bool = Field(True, description="learn behind normalizations")
    linear: bool = Field(False, description="learn between two linear layers with nothing between")
    value: bool = Field(False, description="learn from the values of attention to its output layer")
    relu: bool = Field(False, description="learn through a Relu, from one linear layer to the next")
    gate: bool = Field(False, description="learn through a gated unit, from its up layer to its down layer")

    @model_validator(mode="after")
    def _ranges_have_steps(self) -> Self:
        if self.ranges and not self.end_to_end_steps:
            message = "ranges are learned end to end: with end_to_end_steps: 0 there would be none; give it steps"
            raise PydanticCustomError(COMBINATION, "{faults}", {"faults": message})
        return self


class Prefix(_Section):
    """A token in front of every sequence of a decoder, kept in the graph as constants, where it calms the others."""

    candidates: int = Field(16, ge=1, description="how many of the most frequent tokens are tried")
    reduction: float = Field(
        4.0,
        gt=1,
        description="by what factor the largest input of a linear layer must fall for a prefix to be baked in",
    )


class Exceptions(_Section):
    """Something finer for the few activations of a decoder that no static range of 8 bits holds, chosen by measurement."""

    divergence: float = Field(
        0.02, gt=0, description="divergence of the logits from float, in nats per token, that is good enough"
    )
    per_token_share: float = Field(
        0.25, ge=0, le=1, description="largest share of the linear multiply-adds that may get a range per token"
    )
    two_codes_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="largest share of the linear multiply-adds that may read their input in two codes of 8 bits, which comes"
        " before ranges per token and is static; each is then done twice",
    )
    float_divergence: float = Field(
        0.1, gt=0, description="divergence, with all that is finer, above which layers are left in float"
    )
    float_share: float = Field(
        0.05, ge=0, le=1, description="largest share of the linear multiply-adds that may be left in float"
    )


class CalibrationOptions(_Section):
    """How much calibration data is used."""

    samples: int = Field(128, ge=1, description="samples for activation ranges")
    search_samples: int = Field(16, ge=1, description="samples, of those, for searches")
    max_length: int = Field(128, ge=2, description="tokens per sample of text")
    window: int = Field(
        512, ge=2, description="tokens per sample for a decoder, which gets as many samples less as they are longer"
    )


class UserFunction(_Section):
    """A function of the user's own that changes the graph; see `user_pass`."""

    function: str = Field(description="dotted name of a function of an onnx_ir.Model or an onnx-graphsurgeon Graph")
    place: Literal["before-migration", "before-quantization"] = Field(
        "before-quantization", description="where it runs: on the graph in normal form, or after migration"
    )
    takes: Literal["onnx_ir", "graphsurgeon"] | None = Field(
        None, description="what the function takes; null reads the annotation of its parameter"
    )
    contract: Literal["exact", "reassociated", "lossy"] = Field(
        "lossy", description="what it promises about the function of the graph"
    )


class Recipe(_Section):
    """A whole recipe; a section that is left out, or null, is not done at all."""

    name: str = "unnamed"
    summary: str = ""
    pipeline: str = Field("scalefold.passes:pipeline", description="function from a recipe to its passes")
    weights: Weights = Weights()
    activations: Activations | None = Activations()
    embeddings: Embeddings | None = None
    cache: Cache | None = None
    attention: AttentionForm | None = None
    prefix: Prefix | None = None
    migration: Migration | None = None
    learning: Learning | None = None
    exceptions: Exceptions | None = None
    user_passes: tuple[UserFunction, ...] = ()
    calibration: CalibrationOptions = CalibrationOptions()
    target: Target = "onnxruntime-cpu"
    profile: Profile = Field(
        "throughput",
        description="what linear weights of 4 and 8 bits run on: the integer kernel, blocks read as they are stored"
        " (decode), or whichever is faster on this machine (balanced)",
    )
    rows: tuple[int, ...] = Field(
        (1, 128), min_length=1, description="numbers of rows (batch times tokens) at which balanced measures"
    )
    include: tuple[str, ...] = Field((), description="regular expressions of layers to quantize; empty means all")
    exclude: tuple[str, ...] = Field((), description="regular expressions of layers to leave in float")

    @model_validator(mode="after")
    def _activations_are_there(self) -> Self:
        useless = [
            name for name in ("prefix", "migration", "learning", "exceptions") if getattr(self, name) is not None
        ]
        if self.activations is None and useless:
            message = f"{', '.join(useless)} would do nothing, because activations are null and stay float"
            raise PydanticCustomError(COMBINATION, "{faults}", {"faults": message})
        if self.activations is not None and not self.activations.clipping and self.exceptions is not None:
            message = "exceptions are judged where ranges are fitted: give activations.clipping more than 0"
            raise PydanticCustomError(COMBINATION, "{faults}", {"faults": message})
        return self

    @model_validator(mode="after")
    def _ranges_are_static(self) -> Self:
        per_token = self.activations is not None and self.activations.granularity == "per-token"
        if self.learning is not None and per_token:
            message = "learning: scales are learned for static ranges; use migration with granularity per-token"
            if self.learning.ranges:
                message = "learning.ranges: granularity per-token has no static ranges to learn; use per-tensor"
            raise PydanticCustomError(COMBINATION, "{faults}", {"faults": message})
        return self

    @model_validator(mode="after")
    def _profile_fits(self) -> Self:
        if self.profile != "throughput" and self.target != "onnxruntime-cpu":
            message = (
                f"profile {self.profile} needs target onnxruntime-cpu: blocks are an operator of onnxruntime's own"
            )
            raise PydanticCustomError(COMBINATION, "{faults}", {"faults": message})
        if min(self.rows) < 1:
            raise PydanticCustomError(COMBINATION, "{faults}", {"faults": "rows: every number must be at least 1"})
        return self


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
    except OSError as error:
        raise RecipeError([f"it cannot be read ({error.strerror})"], where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError([f"not YAML ({' '.join(str(error).split())})"], where=str(path)) from error
    if not isinstance(content, dict):
        raise RecipeError(["not a mapping of keys to values"], where=str(path))
    try:
        return Recipe.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise RecipeError([_fault(dict(entry)) for entry in error.errors()], where=str(path)) from error


def recipe_text(recipe: Recipe) -> str:
    """A recipe as the text of a file that `load_recipe` reads it back from, every key with its value."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120))


def changed(recipe: Recipe, changes: dict[str, object]) -> Recipe:
    """A recipe with other values for some of its keys.

    Raises:
        RecipeError: they do not fit the rest.
    """
    try:
        return Recipe.model_validate({**recipe.model_dump(), **changes})
    except ValidationError as error:
        raise RecipeError([_fault(dict(entry)) for entry in error.errors()], where=recipe.name) from error


def _fault(entry: dict[str, object]) -> str:
    location = entry["loc"]
    assert isinstance(location, tuple)
    key = ".".join(str(part) for part in location)
    if entry["type"] == COMBINATION:
        return f"{key}: {entry['msg']}" if key else str(entry["msg"])
    if entry["type"] == "extra_forbidden":
        return f"{key}: no such key"
    return f"{key}: {str(entry['msg'])[:1].lower()}{str(entry['msg'])[1:]}, got {entry['input']!r}"
