"""The compiler: from a source to a folder with a quantized model and the proof of it."""

from __future__ import annotations

import importlib
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from scalefold.compiler import artifact, calibrate, channel_ranges, graph, verify
from scalefold.compiler.calibrate import Calibration
from scalefold.compiler.choice_solver import require_solver
from scalefold.compiler.decoder import (
    POSITION_KEYS,
    first_tokens,
    is_decoder,
    position_limit,
    prefix_length,
    result_names,
)
from scalefold.compiler.errors import CalibrationError, GraphError, PatternError, RecipeError, SourceError
from scalefold.compiler.export import SENTENCE_FILES, export_model
from scalefold.compiler.gates import Gate, run_gates
from scalefold.compiler.intake import clean, read_onnx
from scalefold.compiler.last_logits import output_layer_input
from scalefold.compiler.layer_formats import formats_of
from scalefold.compiler.mixed_precision import Goal, Search, judged, search
from scalefold.compiler.protocol import (
    Context,
    Contract,
    Fused,
    Pass,
    PassResult,
    Pipeline,
    Progress,
    Requests,
    missing_facts,
    refusals,
    select,
    silent,
)
from scalefold.compiler.recipe import Profile, Recipe, Target, changed, load_recipe, recipe_text
from scalefold.compiler.runtime import Array, Feed, Session, give_back_memory, inputs_of, unsupported_ops
from scalefold.compiler.stats import Statistic
from scalefold.compiler.user_pass import UserPass

HELD_OUT = 16
"""Samples kept out of calibration, on which the result is compared with float."""

COMPARED = 128
"""Tokens of each held-out sample on which layers are compared: all of their outputs are held at once."""

SPILLED = 1 << 16
"""Weights larger than this, in bytes, that passes make are kept in a file, not in memory."""

AUTO = "auto"
"""The recipe that is chosen by measurement."""

RECIPE = "recipe.yaml"
"""The file of the output folder with the recipe that was chosen."""

TOOLS = ("scalefold", "numpy", "onnx", "onnx-ir", "onnx-graphsurgeon", "onnxruntime", "tokenizers")
SIDECARS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", *SENTENCE_FILES,
)  # fmt: skip


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, for the record."""

    name: str
    contract: str
    rewrites: tuple[dict[str, Any], ...]
    declined: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class LayerReport:
    """One linear layer of the result.

    Attributes:
        name: the layer.
        shape: (K, N) of the weight.
        kernel: the operator onnxruntime runs it with on this machine.
        integer: whether that is a fast integer kernel.
        sqnr_db: output of the layer in the quantized graph against float, on held-out samples; None when not measured.
        activation: what has a scale of its own: the tensor, each token, or nothing in a float layer.
    """

    name: str
    shape: tuple[int, int]
    kernel: str
    integer: bool
    sqnr_db: float | None
    activation: verify.Activation = "per-tensor"


@dataclass(frozen=True)
class CompileReport:
    """What `compile_model` did and measured.

    Attributes:
        output: the folder; None after a dry run.
        recipe: the recipe's name.
        source: what was compiled.
        target: what it was compiled for.
        layers: every linear layer.
        outputs: the outputs against float, on held-out samples.
        calibration: origin, number and digest of the samples.
        held_out: where the samples of the comparison come from.
        passes: what every pass did and declined.
        notes: remarks a user should read.
        float_bytes: size of the float ONNX model.
        bytes: size of the compiled model; an estimate after a dry run.
        parts: what those bytes are: linear weights, embeddings, other constants and the graph; read from the file.
        gates: properties that hold of the result, or do not; see `gates`.
        load_seconds: time onnxruntime takes to open it; not part of the record.
        seconds: time of each stage; not part of the record.
        peak_bytes: peak resident memory of this process; not part of the record.
        export_peak_bytes: the same of the process that exported a Hugging Face model; not part of the record.
        search: what recipe `auto` found; not part of the record.
    """

    output: Path | None
    recipe: str
    source: str
    target: str
    layers: tuple[LayerReport, ...]
    outputs: tuple[verify.Fidelity, ...]
    calibration: dict[str, Any]
    held_out: str
    passes: tuple[PassRecord, ...]
    notes: tuple[str, ...]
    float_bytes: int
    bytes: int
    parts: dict[str, artifact.Part] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()
    load_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    export_peak_bytes: int = 0
    search: Search | None = None

    @property
    def integer_layers(self) -> int:
        """How many linear layers run on integer kernels."""
        return sum(layer.integer for layer in self.layers)


@dataclass
class _Source:
    """A model that has been opened: its float graph, and the files that travel with it."""

    name: str
    folder: Path
    model: ir.Model
    manifest: dict[str, Any] | None
    notes: list[str]
    bytes: int

    @property
    def longest(self) -> int:
        """The longest sequence that the model's config has positions for; without bound where it does not say."""
        return position_limit(self.folder) or sys.maxsize

    @property
    def tokenizer_file(self) -> Path | None:
        path = self.folder / "tokenizer.json"
        return path if path.is_file() else None


def compile_model(
    source: object,
    output: str | Path | None,
    *,
    recipe: str | Path | Recipe = "w8a8",
    calibration: object = None,
    samples: int | None = None,
    task: str | None = None,
    target: Target | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_float: Sequence[str] = (),
    max_float_fraction: float | None = None,
    profile: Profile | None = None,
    rows: Sequence[int] = (),
    goal: Goal | None = None,
    base: str | Path | Recipe | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> CompileReport:
    """Compile a model to a folder that onnxruntime and transformers load.

    Args:
        source: a hub id, a folder, a transformers model, an `.onnx` file, the `onnx_ir.Model` that transformers' exporter
            gives, or the name of a reference model.
        output: the folder to write; may be None for a dry run. An earlier result there is replaced whole.
        recipe: a named recipe, a YAML file, or a `Recipe`; `auto` chooses formats layer by layer, see `goal`.
        calibration: see `calibrate.calibration_from`; None takes text of the Python installation.
        samples: overrides the recipe's number of samples.
        task: for Hugging Face models; found from the config when None.
        target: overrides the recipe's.
        include: regular expressions of layers to quantize, besides the recipe's; all layers when there are none.
        exclude: regular expressions of layers to leave in float, besides the recipe's.
        allow_float: regular expressions of layers that may miss their integer kernel.
        max_float_fraction: overrides the largest share of the linear multiply-adds that the recipe's exceptions may leave
            in float.
        profile: overrides the recipe's.
        rows: overrides the recipe's, when not empty.
        goal: the target that recipe `auto` meets by measurement; see `mixed_precision`.
        base: the recipe that `auto` starts from; `w8a8` when None.
        dry_run: only open the model, and say what would be done.
        progress: opens progress bars.

    Raises:
        ScalefoldError: one sentence that says what is wrong, where, and what would help.
    """
    named = _base_of(recipe, goal, base, dry_run=dry_run)
    if goal is not None and max_float_fraction is not None:
        raise SourceError(
            "a search leaves no layer in float",
            where="--max-float-fraction",
            remedy="exclude the layers, or leave it out",
        )
    plan = _with_overrides(load_recipe(named), samples, target, include, exclude, profile, rows)
    if max_float_fraction is not None:
        plan = _with_float_share(plan, max_float_fraction)
    pipeline = _pipeline(plan)
    place = None if output is None or dry_run else Path(output).absolute()
    if place is not None:
        artifact.check_output(place)
    elif not dry_run:
        raise SourceError("there is no output folder", where="output", remedy="give one, or ask for a dry run")
    with _scratch(place) as scratch:
        clock = _Clock()
        opened = _open(source, scratch / "float", task, clock, progress)
        run = _Run(plan, opened, progress, clock, pipeline.fused)
        run.apply(pipeline.normalize)
        planned = _planned(opened, plan, allow_float)
        if dry_run:
            return run.estimate(planned)
        run.calibrate(_own_samples(source) if calibration is None else calibration)
        run.apply(pipeline.transform)
        run.spill(opened.folder if scratch in opened.folder.parents else scratch)
        if goal is not None:
            pipeline = run.choose(goal, scratch / "search")
        run.apply(pipeline.quantize)
        run.compare_layers(scratch)
        run.judge()
        run.apply(pipeline.lower)
        return run.write(scratch / "result", place, allow_float)


class _Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class _Run:
    """One compilation, from the opened source to the written folder."""

    def __init__(self, recipe: Recipe, source: _Source, progress: Progress, clock: _Clock, fused: Fused) -> None:
        self.recipe = recipe
        self.source = source
        self.original = source.model.clone()
        self.tamed = self.original
        self.progress = progress
        self.clock = clock
        self.fused = fused
        self.context = Context(progress=progress, fused=fused)
        self.records: list[PassRecord] = []
        self.calibration: dict[str, Any] = {}
        self.held_out: list[Feed] = []
        self.held_origin = ""
        self.layer_sqnr: dict[str, float] = {}
        self.ranges: list[channel_ranges.Ranges] = []
        self.search: Search | None = None
        self.output_layer_input: str | None = None

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Time a stage, and give back the memory that it took."""
        with self.clock.stage(name):
            yield
            _release_memory(self.original, self.tamed)

    def apply(self, passes: Sequence[Pass]) -> None:
        """Run passes in order, each only on a graph that has the facts it requires."""
        for entry in passes:
            if missing := next(missing_facts(entry, self.source.model), None):
                raise GraphError(
                    f"pass {entry.name} needs a graph in which {missing.value}",
                    where=self.source.name,
                    remedy="put the passes that provide it before, or exclude fewer layers",
                )
            with self._stage(entry.name):
                result = entry.run(self.source.model, self.context)
                if result.changed and not graph.is_quantized(self.source.model):
                    self._retame(entry)
            self.records.append(_record(entry, result))

    def _retame(self, entry: Pass) -> None:
        """Take the float graph as it is now for the one to compare layers with.

        Migration changes what single layers give; where a pass changes the function itself, the outputs to aim for too.
        """
        self.tamed = self.source.model.clone()
        self.context = replace(self.context, float_model=self.tamed)
        if isinstance(entry, UserPass) and entry.contract is Contract.LOSSY:
            self.original = self.tamed
        if entry.contract is Contract.LOSSY:
            self.context = replace(self.context, reference=_reference(self.tamed, self.context.search, self.fused))

    def calibrate(self, given: object) -> None:
        """Open the calibration data, and set some of it apart for the comparison with float."""
        options = self.recipe.calibration
        decoder = is_decoder(self.source.model)
        length = min(options.window if decoder else options.max_length, self.source.longest)
        fewer = max(1, length // options.max_length) if decoder else 1
        samples, held_out = -(-options.samples // fewer), -(-HELD_OUT // fewer)
        whole = calibrate.calibration_from(
            given,
            self.source.model,
            tokenizer_file=self.source.tokenizer_file,
            samples=samples + held_out,
            max_length=length,
        )
        used, held = whole.split(held_out, samples)
        self.held_out = held.head(held_out)
        self.held_origin = f"{held.count} samples of {whole.origin}"
        self.held_origin += ", held out" if held is not whole else ", which were calibrated on: too few to hold any out"
        self.calibration = {"origin": used.origin, "samples": used.count, "digest": used.digest()}
        search_samples = -(-options.search_samples // fewer)
        self.context = _context(used, search_samples, self.tamed, self.progress, self.fused)
        self._measure_ranges()

    def spill(self, folder: Path) -> None:
        """Move weights that passes made in memory to a file in `folder`, from where they are mapped when needed."""
        made = {
            name: value.const_value
            for name, value in self.source.model.graph.initializers.items()
            if value.const_value is not None
            and not isinstance(value.const_value, ir.ExternalTensor)
            and value.const_value.nbytes > SPILLED
        }
        moved = ir.external_data.convert_tensors_to_external(list(made.values()), folder, "transformed.data")
        for (name, tensor), outside in zip(made.items(), moved, strict=True):
            for model in (self.source.model, self.tamed):
                value = model.graph.initializers.get(name)
                if value is not None and value.const_value is tensor:
                    value.const_value = outside

    def choose(self, goal: Goal, folder: Path) -> Pipeline:
        """Search for the recipe that meets a goal, take it for this run's, and give its passes."""
        folder.mkdir()
        with self._stage("search"):
            seen = self.held_out[::2]
            self.recipe, self.search = search(
                self.source.model, self.recipe, goal, self.context, seen, _pipeline, folder
            )
        shutil.rmtree(folder)
        return _pipeline(self.recipe)

    def judge(self) -> None:
        """Measure what a search has led to, on samples that weights and ranges were not fitted to."""
        if self.search is not None:
            self.search = judged(self.search, self.tamed, self.source.model, self.held_out)

    def _measure_ranges(self) -> None:
        """Measure how far each channel reaches in the float graph as it is now."""
        names = {layer.name for layer in graph.linear_layers(self.tamed)}
        feeds = [first_tokens(feed, COMPARED, self.tamed) for feed in self.held_out]
        with self._stage("channel ranges"):
            self.ranges.append(channel_ranges.measure(self.fused(self.tamed), names, feeds))

    def compare_layers(self, folder: Path) -> None:
        """Measure each layer's output against float, while values still have the float graph's names."""
        self._measure_ranges()
        with self._stage("compare layers"), self.progress("comparing layers", 1) as advance:
            feeds = [first_tokens(feed, COMPARED, self.tamed) for feed in self.held_out]
            self.layer_sqnr = verify.layer_sqnr(self.fused(self.tamed), self.fused(self.source.model), feeds, folder)
            advance()

    def write(self, stage: Path, place: Path | None, allow_float: Sequence[str]) -> CompileReport:
        """Save the model, verify the saved file, add the record, and put the folder in its place."""
        assert place is not None
        stage.mkdir()
        with self.clock.stage("write"):
            artifact.save_model(self.source.model, stage)
            self.output_layer_input = output_layer_input(self.source.model)
            self._add_sidecars(stage)
            channel_ranges.write(stage, *self.ranges)
        with self.clock.stage("verify"), self.progress("verifying", 3) as advance:
            kernels = verify.layer_kernels(stage / artifact.MODEL, weight_only=self.recipe.activations is None)
            advance()
            verify.require_integer_kernels(kernels, allow_float)
            results = result_names(self.original)
            expected = verify.kept_outputs(self.fused(self.original), results, self.held_out, stage.parent)
            session = Session(stage / artifact.MODEL)
            outputs = verify.fidelity(expected, session, self.held_out)
            rows = verify.rounds_rows(kernels)
            gates = run_gates(self.source.model, session, self.held_out[0], rounds_rows=rows)
            del session
            advance()
            load_seconds = verify.load_seconds(stage / artifact.MODEL)
            advance()
        layers = tuple(
            LayerReport(
                entry.name, entry.shape, entry.kernel, entry.integer, self.layer_sqnr.get(entry.name), entry.activation
            )
            for entry in kernels
        )
        report = self._report(place, layers, tuple(outputs), artifact.size_of(stage), load_seconds)
        report = replace(report, parts=artifact.parts(stage), gates=tuple(gates), search=self.search)
        if self.search is not None:
            (stage / RECIPE).write_text(recipe_text(self.recipe), encoding="utf-8")
        artifact.write_json(stage / artifact.RECORD, self._content(report))
        artifact.publish(stage, place)
        return report

    def estimate(self, layers: Sequence[graph.Linear]) -> CompileReport:
        """What a dry run says: the layers that would be quantized, and the size to expect."""
        saved = 0
        for layer in layers:
            (k, n), bits = layer.shape, self.recipe.weights.of(layer.name).bits
            saved += 4 * k * n - (k * n * bits + 7) // 8 - 4 * n
        if self.recipe.embeddings is not None:
            tables = {node.inputs[0] for node in graph.nodes(self.source.model, "Gather")}
            sizes = [
                table.const_value.nbytes for table in tables if table and graph.rank(table) == 2 and table.const_value
            ]
            saved += sum(size * (32 - self.recipe.embeddings.bits) // 32 for size in sizes)
        planned = tuple(LayerReport(layer.name, layer.shape, "planned", False, None) for layer in layers)
        return self._report(None, planned, (), self.source.bytes - saved, 0.0)

    def _report(
        self,
        place: Path | None,
        layers: tuple[LayerReport, ...],
        outputs: tuple[verify.Fidelity, ...],
        size: int,
        load_seconds: float,
    ) -> CompileReport:
        return CompileReport(
            output=place,
            recipe=self.recipe.name,
            source=self.source.name,
            target=self.recipe.target,
            layers=layers,
            outputs=outputs,
            calibration=self.calibration,
            held_out=self.held_origin,
            passes=tuple(self.records),
            notes=tuple(self.source.notes),
            float_bytes=self.source.bytes,
            bytes=size,
            load_seconds=load_seconds,
            seconds=self.clock.seconds,
            peak_bytes=peak_memory(),
            export_peak_bytes=peak_memory(resource.RUSAGE_CHILDREN),
        )

    def _content(self, report: CompileReport) -> dict[str, Any]:
        """The record: everything that is the same in every run with the same inputs."""
        content = asdict(report)
        for name in ("output", "load_seconds", "seconds", "peak_bytes", "export_peak_bytes", "search"):
            del content[name]
        content |= {"output_layer_input": self.output_layer_input, "recipe": self.recipe.model_dump(mode="json")}
        return {"schema_version": 1, **content, "tools": _versions()}

    def _add_sidecars(self, stage: Path) -> None:
        for name in SIDECARS:
            if (self.source.folder / name).is_file():
                (stage / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.source.folder / name, stage / name)
        if taken := prefix_length(self.source.model):
            _shorten_positions(stage / "config.json", taken)
        manifest = self.source.manifest or artifact.manifest(self.source.model)
        artifact.write_json(stage / artifact.MANIFEST, manifest)


def _shorten_positions(config: Path, taken: int) -> None:
    """Leave the positions that a prefix takes up out of those that a config offers."""
    if not config.is_file():
        return
    content = json.loads(config.read_text(encoding="utf-8"))
    for name in POSITION_KEYS & content.keys():
        if isinstance(content[name], int):  # null where the model has no table
            content[name] -= taken
    artifact.write_json(config, content)


def _with_overrides(
    recipe: Recipe,
    samples: int | None,
    target: Target | None,
    include: Sequence[str],
    exclude: Sequence[str],
    profile: Profile | None,
    rows: Sequence[int],
) -> Recipe:
    changes: dict[str, Any] = {"include": (*recipe.include, *include), "exclude": (*recipe.exclude, *exclude)}
    changes |= {"target": target} if target is not None else {}
    changes |= {"profile": profile} if profile is not None else {}
    changes |= {"rows": tuple(rows)} if rows else {}
    if samples is not None:
        if samples < 1:
            raise CalibrationError(f"{samples} samples are too few", where="--samples", remedy="give at least 1")
        changes["calibration"] = recipe.calibration.model_copy(update={"samples": samples})
    return changed(recipe, changes)


def _base_of(
    recipe: str | Path | Recipe, goal: Goal | None, base: str | Path | Recipe | None, *, dry_run: bool
) -> str | Path | Recipe:
    """The recipe to read; finds what does not go together with a search."""
    if recipe != AUTO:
        if goal is not None or base is not None:
            what = "a target" if goal is not None else "a base recipe"
            raise SourceError(
                f"{what} is for --recipe {AUTO}, which chooses by it", where=f"recipe {recipe}", remedy="leave it out"
            )
        return recipe
    if goal is None:
        raise SourceError(
            "there is no target to choose by", where=f"recipe {AUTO}", remedy="give an error, a size or a latency"
        )
    if dry_run:
        raise SourceError(
            "a search has to run the model, so there is no dry run of it",
            where=f"recipe {AUTO}",
            remedy="give an output folder, or dry-run the base recipe",
        )
    require_solver()
    found = load_recipe("w8a8" if base is None else base)
    if found.activations is None:
        raise RecipeError(["activations are null, and how they are rounded is part of the choice"], where=found.name)
    return found


def _with_float_share(recipe: Recipe, share: float) -> Recipe:
    if not 0 <= share <= 1:
        raise RecipeError([f"{share} is no share between 0 and 1"], where="--max-float-fraction")
    if recipe.exceptions is None:
        raise RecipeError(
            ["it has no section `exceptions`, so it leaves no layer in float"],
            where=f"recipe {recipe.name} with --max-float-fraction",
        )
    return recipe.model_copy(update={"exceptions": recipe.exceptions.model_copy(update={"float_share": share})})


def _pipeline(recipe: Recipe) -> Pipeline:
    """Find the function that the recipe names, by `module:function`."""
    module, _, name = recipe.pipeline.partition(":")
    try:
        built = getattr(importlib.import_module(module), name)(recipe)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise RecipeError([f"pipeline: {recipe.pipeline!r} cannot be used ({error})"], where=recipe.name) from error
    if not isinstance(built, Pipeline):
        raise RecipeError([f"pipeline: {recipe.pipeline!r} does not return a Pipeline"], where=recipe.name)
    return built


@contextmanager
def _scratch(place: Path | None) -> Iterator[Path]:
    if place is None:
        with tempfile.TemporaryDirectory(prefix="scalefold-") as folder:
            yield Path(folder)
    else:
        with artifact.staged(place) as folder:
            yield folder


def _open(source: object, folder: Path, task: str | None, clock: _Clock, progress: Progress) -> _Source:
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    if isinstance(source, str) and source in (builders := _reference_builders()):
        module, function = builders[source]
        source = getattr(module, function)()
    if isinstance(source, ir.Model):
        with clock.stage("export"):
            folder.mkdir(parents=True)
            ir.save(source, folder / artifact.MODEL, external_data=artifact.DATA)
            return _opened("onnx_ir.Model", folder / artifact.MODEL, read_onnx(folder / artifact.MODEL), None)
    if isinstance(source, str | Path) and (str(source).endswith(".onnx") or Path(source).is_file()):
        with clock.stage("intake"):
            path = Path(source)
            model = clean(read_onnx(path), str(path))
            return _opened(str(path), path, model, None)
    with clock.stage("export"), progress("exporting", 1) as advance:
        export_model(source, folder, task)
        advance()
    manifest = json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))
    return _opened(name, folder / artifact.MODEL, read_onnx(folder / artifact.MODEL), manifest)


def _opened(name: str, path: Path, model: ir.Model, manifest: dict[str, Any] | None) -> _Source:
    unknown = unsupported_ops(model)
    notes = [f"operators unknown to onnxruntime's CPU are passed around: {', '.join(unknown)}"] if unknown else []
    tensors = [value.const_value for value in model.graph.initializers.values()]
    data = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    size = sum(file.stat().st_size for file in (path, *data))
    return _Source(name, path.parent, model, manifest, notes, size)


@contextmanager
def open_source(source: object, *, task: str | None = None, progress: Progress = silent) -> Iterator[ir.Model]:
    """The float graph of any source in normal form, for looking at or comparing with; see `compile_model`."""
    with _scratch(None) as scratch:
        opened = _open(source, scratch / "float", task, _Clock(), progress)
        for entry in _pipeline(Recipe()).normalize:
            entry.run(opened.model, Context())
        yield opened.model


@contextmanager
def open_with_samples(
    source: object, recipe: str | Path | None, calibration: object, progress: Progress = silent
) -> Iterator[tuple[ir.Model, list[Feed]]]:
    """The float graph of any source in normal form, behind a recipe's float passes where one is given, and samples.

    Samples are those that `compile_model` would hold out.
    """
    plan = load_recipe(recipe) if recipe is not None else Recipe()
    pipeline, clock = _pipeline(plan), _Clock()
    with _scratch(None) as scratch:
        opened = _open(source, scratch / "float", None, clock, progress)
        run = _Run(plan, opened, progress, clock, pipeline.fused)
        run.apply(pipeline.normalize)
        run.calibrate(_own_samples(source) if calibration is None else calibration)
        if recipe is not None:
            run.apply(pipeline.transform)
        yield opened.model, run.held_out


def _planned(source: _Source, recipe: Recipe, allow_float: Sequence[str]) -> list[graph.Linear]:
    """The linear layers that the recipe quantizes; finds faults in patterns before any work is done."""
    layers = graph.linear_layers(source.model)
    if not layers:
        raise GraphError(
            "the graph has no linear layer (a MatMul or Gemm with a constant float32 weight)",
            where=source.name,
            remedy="give a float transformer; a model that is quantized already cannot be quantized again",
        )
    names = [layer.name for layer in layers]
    select(allow_float, names, what="allow-float")
    if recipe.activations is not None:
        select(recipe.activations.per_token, names, what="per-token")
    left = refusals(names, recipe.include, recipe.exclude)
    if len(left) == len(layers):
        raise PatternError(
            f"they leave all {len(layers)} linear layers in float",
            where="include and exclude patterns",
            remedy="exclude fewer layers",
        )
    chosen = [layer for layer in layers if layer.name not in left]
    formats_of(recipe.weights, chosen, left)
    return chosen


def _context(used: Calibration, search_samples: int, original: ir.Model, progress: Progress, fused: Fused) -> Context:
    search = used.head(search_samples)

    def measure(model: ir.Model, requests: Requests) -> dict[str, Statistic]:
        quick = fused(model)
        kept = {value.name for node in quick.graph for value in node.outputs} | set(inputs_of(quick))
        with progress("calibrating", used.count) as advance:
            # what is asked for may lie inside what was fused
            return calibrate.collect(quick if kept >= requests.keys() else model, requests, used.feeds(), advance)

    return Context(
        measure=measure,
        search=search,
        reference=_reference(original, search, fused),
        float_model=original,
        progress=progress,
        fused=fused,
    )


def _reference(model: ir.Model, feeds: Sequence[Feed], fused: Fused) -> Callable[[], list[dict[str, Array]]]:
    """The results of a float model for some feeds, computed on first use."""

    @cache
    def results() -> list[dict[str, Array]]:
        session = Session(fused(model), outputs=result_names(model))
        return [session.run(feed) for feed in feeds]

    return results


def _release_memory(*models: ir.Model) -> None:
    """Give back what a pass has read or replaced.

    Weights that have been read stay mapped.
    """
    for model in models:
        for value in model.graph.initializers.values():
            graph.unmap(value)
    give_back_memory()


def _record(entry: Pass, result: PassResult) -> PassRecord:
    def plain(events: Sequence[Any]) -> tuple[dict[str, Any], ...]:
        return tuple(
            {
                "where": event.where,
                "reason": event.reason,
                **({"figures": dict(event.figures)} if event.figures else {}),
            }
            for event in events
        )

    return PassRecord(entry.name, entry.contract.name, plain(result.rewrites), plain(result.declined))


def reference_models() -> tuple[str, ...]:
    """The names of the reference models that ship with the package, `NAME-outliers` for those with planted outliers."""
    return tuple(sorted(_reference_builders()))


def _own_samples(source: object) -> list[str] | None:
    """The texts that a reference model is calibrated on when none are given; None for the default text."""
    known = _reference_builders()
    texts: list[str] = known[source][0].samples() if isinstance(source, str) and source in known else []
    return None if not texts or texts == calibrate.default_texts() else texts


def _reference_builders() -> dict[str, tuple[ModuleType, str]]:
    """For each reference model its module, and the function in it that gives its folder."""
    folder = Path(importlib.import_module("scalefold.models").__file__ or "").parent
    found = {}
    for path in sorted(folder.glob("*.py")):
        module = importlib.import_module(f"scalefold.models.{path.stem}")
        for function, suffix in (("build", ""), ("build_outliers", "-outliers")):
            if hasattr(module, function):
                found[path.stem.replace("_", "-") + suffix] = (module, function)
    return found


def peak_memory(who: int = resource.RUSAGE_SELF) -> int:
    """Peak resident memory in bytes, of this process or of the largest of its children."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def _versions() -> dict[str, str]:
    found = {}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
