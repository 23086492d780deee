"""The command line: compile, verify, inspect, report, sensitivity, diff, eval, generate, bench, tune, recipes."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from scalefold.compiler import artifact, bench, calibrate, evaluate, graph, verify
from scalefold.compiler.ceilings import ceilings
from scalefold.compiler.choice_solver import Quantity
from scalefold.compiler.diff import diff_files
from scalefold.compiler.driver import AUTO, RECIPE, CompileReport, compile_model, open_source, reference_models
from scalefold.compiler.errors import InterruptError, OutputError, ScalefoldError, SourceError, needing_packages
from scalefold.compiler.fusing import fuse_folder
from scalefold.compiler.gates import PARITY_TOKENS, Gate, require_gates, run_gates
from scalefold.compiler.generate import Generator, Sampling
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.kernel_library import LIBRARY
from scalefold.compiler.mixed_precision import Search, read_goal
from scalefold.compiler.recipe import Profile, Target, load_recipe, named_recipes
from scalefold.compiler.report import gather_report
from scalefold.compiler.report_page import render, write_plots
from scalefold.compiler.runtime import Session, inputs_of
from scalefold.compiler.sensitivity import Sensitivity, measure_sensitivity, plot
from scalefold.compiler.task_data import Task
from scalefold.compiler.tunable_weights import Train

app = typer.Typer(
    name="scalefold",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Compile transformers to ONNX graphs that run on onnxruntime's integer CPU kernels, and prove it.",
)
errors = Console(stderr=True)
SMALL_SHARE = 0.005
"""Of a run's time: what takes less is added up in the table of a profile."""
AUTO_PANEL = "Options of --recipe auto, which needs one target"
Json = Annotated[bool, typer.Option("--json", help="Print the facts as JSON on stdout and nothing else there.")]


@app.command("compile")
def compile_command(
    source: Annotated[
        str, typer.Argument(help="A hub id, a model folder, an .onnx file, or a reference model's name.")
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The folder to write.")] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="A named recipe or a YAML file, see `scalefold recipes`; or auto, which chooses format, bits and"
            " granularity of every layer by measurement, for one of the targets."
        ),
    ] = "w8a8",
    target_error: Annotated[
        str | None,
        typer.Option(
            help="The smallest model with at most this error: of a decoder the divergence of its logits in nats, of"
            " others 1 - cosine of the first output.",
            metavar="NUMBER",
            rich_help_panel=AUTO_PANEL,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            help="The least error in a file of at most this size, such as 20MB.",
            metavar="SIZE",
            rich_help_panel=AUTO_PANEL,
        ),
    ] = None,
    target_latency: Annotated[
        str | None,
        typer.Option(
            help="The least error with linear layers that take at most so long, such as 5ms: the mean over --rows, by"
            " kernels timed on this machine.",
            metavar="TIME",
            rich_help_panel=AUTO_PANEL,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The recipe to start from; default: w8a8.", rich_help_panel=AUTO_PANEL),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text, JSON lines or .npz to calibrate on; default: English text of the Python installation."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples; default: what the recipe says.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="feature-extraction, masked-lm, sequence-classification, token-classification, question-answering or"
            " causal-lm; default: what the model's config says."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="onnxruntime-cpu (fused operators, the default) or qdq (standard ONNX only).")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Regular expression of layers to quantize; may be repeated; default: all.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Regular expression of layers to leave in float; may be repeated.")
    ] = None,
    allow_float: Annotated[
        list[str] | None, typer.Option(help="Regular expression of layers that may miss their integer kernel.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="What linear weights of 4 and 8 bits run on: throughput (the integer kernel, the default), decode (blocks,"
            " read as stored), or balanced (measured here at --rows)."
        ),
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(help="Number of rows at which balanced and auto time kernels; may be repeated.")
    ] = None,
    max_float_fraction: Annotated[
        float | None,
        typer.Option(help="Largest share of the linear multiply-adds left in float; default: what the recipe says."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Compile SOURCE to a folder with a quantized model, its tokenizer and the proof of what it became."""
    if target not in (None, "onnxruntime-cpu", "qdq"):
        raise SourceError(f"there is no target {target!r}", where="--target", remedy="choose onnxruntime-cpu or qdq")
    if profile not in (None, *get_args(Profile)):
        raise SourceError(
            f"there is no profile {profile!r}", where="--profile", remedy=f"choose {', '.join(get_args(Profile))}"
        )
    targets: dict[Quantity, str | None] = {"error": target_error, "bytes": target_size, "seconds": target_latency}
    goal = read_goal(targets) if recipe == AUTO or any(targets.values()) else None
    with _progress(quiet=as_json) as progress:
        report = compile_model(
            source,
            output,
            recipe=recipe,
            calibration=calibration,
            samples=samples,
            task=task,
            target=cast(Target | None, target),
            include=include or (),
            exclude=exclude or (),
            allow_float=allow_float or (),
            max_float_fraction=max_float_fraction,
            profile=cast(Profile | None, profile),
            rows=rows or (),
            goal=goal,
            base=base,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        _print_json({**asdict(report), "integer_layers": report.integer_layers, "output": str(report.output or "")})
    else:
        _print_report(report)


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="A folder that `scalefold compile` wrote, or an .onnx file.")],
    allow_float: Annotated[
        list[str] | None, typer.Option(help="Regular expression of layers that may miss their integer kernel.")
    ] = None,
    gates: Annotated[
        bool,
        typer.Option(
            help="Also run it: alone and in a batch, with and without its cache; look for saturating weights."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Load a compiled model with onnxruntime on this machine and say which kernel every linear layer gets."""
    model = folder / artifact.MODEL if folder.is_dir() else folder
    if not model.is_file():
        raise SourceError("there is no model.onnx in it", where=str(folder), remedy="give a compiled folder")
    recorded = artifact.read_record(folder) if folder.is_dir() else {}
    sqnr = {layer["name"]: layer["sqnr_db"] for layer in recorded.get("layers", [])}
    weight_only = recorded.get("recipe", {}).get("activations", {}) is None
    kernels = verify.layer_kernels(model, weight_only=weight_only)
    checked = _checked_gates(model, kernels) if gates else []
    seconds = verify.load_seconds(model)
    if as_json:
        _print_json(
            {
                "layers": [asdict(kernel) | {"sqnr_db": sqnr.get(kernel.name)} for kernel in kernels],
                "outputs": recorded.get("outputs", []),
                "held_out": recorded.get("held_out", ""),
                "gates": [asdict(gate) for gate in checked],
                "load_seconds": seconds,
                "bytes": artifact.size_of(folder) if folder.is_dir() else model.stat().st_size,
            }
        )
    else:
        _print_kernels(kernels, sqnr)
        _print_outputs(
            [verify.Fidelity(**entry) for entry in recorded.get("outputs", [])], recorded.get("held_out", "")
        )
        for gate in checked:
            Console().print(f"{gate.name}: {_gate_line(gate)}")
        Console().print(f"loads in {seconds:.2f} s")
    verify.require_integer_kernels(kernels, allow_float or ())
    require_gates(checked, str(folder))


@app.command("fuse")
def fuse_command(
    folder: Annotated[Path, typer.Argument(help="A folder that `scalefold compile` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    any_cpu: Annotated[
        bool, typer.Option("--any-cpu", help="Go on where this machine's processor has no AVX512-VNNI.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="What to compare both folders on, as for calibration; default: English text."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a compiled model run on scalefold's own kernels, a library beside it: faster, where sessions can load one."""
    with _progress(quiet=as_json) as progress:
        report = fuse_folder(folder, output, any_cpu=any_cpu, data=data, progress=progress)
    if as_json:
        _print_json({**asdict(report), "output": str(report.output)})
        return
    console = Console(soft_wrap=True, highlight=False)
    for what, count in report.fused.items():
        console.print(f"{count:5} x {what}")
    for layer, reason in report.declined.items():
        console.print(f"{_escape(layer)} stays on onnxruntime's kernel: {reason}")
    _print_outputs(report.outputs, report.held_out, against="the folder that was fused")
    console.print(f"{report.output}: {report.bytes / 1e6:.1f} MB, loads in {report.load_seconds:.2f} s; open it with")
    console.print(f"options.register_custom_ops_library('{report.output / LIBRARY}')")


@app.command()
def inspect(
    source: Annotated[Path, typer.Argument(help="An .onnx file or a folder with model.onnx in it.")],
    as_json: Json = False,
) -> None:
    """List the inputs, outputs and linear layers of a model, with the names that patterns select by."""
    path = source / artifact.MODEL if source.is_dir() else source
    with open_source(path) as model:
        if any(verify.quantized_layers(model)):
            kernels = verify.layer_kernels(path)
            layers = [{"name": entry.name, "shape": entry.shape, "quantized": entry.planned} for entry in kernels]
        else:
            layers = [
                {"name": entry.name, "shape": entry.shape, "quantized": False} for entry in graph.linear_layers(model)
            ]
        facts: dict[str, Any] = {
            "inputs": {name: str(value.shape) for name, value in inputs_of(model).items()},
            "outputs": {value.name: str(value.shape) for value in model.graph.outputs},
            "nodes": len(model.graph),
            "layers": layers,
        }
    if as_json:
        _print_json(facts)
        return
    console = Console()
    console.print(
        f"inputs   {facts['inputs']}\noutputs  {facts['outputs']}\nnodes    {facts['nodes']}", highlight=False
    )
    table = Table("linear layer", "K x N", "weights", title=f"{len(layers)} linear layers")
    for entry in layers:
        k, n = cast(tuple[int, int], entry["shape"])
        table.add_row(str(entry["name"]), f"{k} x {n}", "integer" if entry["quantized"] else "float32")
    console.print(table)


def _write_text(path: Path, text: str) -> None:
    """Write a file whole, or leave an earlier one as it is."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"it cannot be written ({error.strerror})", where=str(path), remedy="give another place")


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="A folder that `scalefold compile` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")] = Path("report.html"),
    against: Annotated[
        str | None,
        typer.Option(help="The float model, to compare speed and outputs with: a hub id, folder or .onnx file."),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="A folder to write every plot to, as SVG files.")] = None,
    png: Annotated[bool, typer.Option("--png", help="Write the plots as PNG files too.")] = False,
    as_json: Json = False,
) -> None:
    """Write what is known of a compiled model to one HTML page: ranges, errors, kernels, time, size, passes."""
    if png and plots is None:
        raise OutputError("there is no folder for the plots", where="--png", remedy="give one with --plots")
    with _progress(quiet=as_json) as progress:
        report = gather_report(folder, against, progress)
    _write_text(output, render(report))
    try:
        drawn = [] if plots is None else write_plots(report, plots, png=png)
    except OSError as error:
        raise _unwritable(Path(error.filename or plots or ""), error) from error
    if as_json:
        _print_json({**report.facts(), "output": str(output), "plots": [str(path) for path in drawn]})
        return
    many = f", and {len(drawn)} plots in {plots}" if drawn else ""
    Console().print(f"{output}: {output.stat().st_size / 1e6:.2f} MB{many}", soft_wrap=True, highlight=False)


@app.command("sensitivity")
def sensitivity_command(
    source: Annotated[
        str, typer.Argument(help="A float model: a hub id, a folder, an .onnx file, or a reference model's name.")
    ],
    recipe: Annotated[
        str | None, typer.Option(help="Measure behind this recipe's migration; default: the model as it is.")
    ] = None,
    bits: Annotated[str, typer.Option(help="Bit widths of weights and inputs, with commas.")] = "8,6,4",
    top: Annotated[int, typer.Option(min=0, help="Run the whole model for so many of the worst layers.")] = 16,
    calibration: Annotated[
        Path | None, typer.Option(help="Text, JSON lines or .npz; default: English text of the Python installation.")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="An SVG file to draw it to.")] = None,
    as_json: Json = False,
) -> None:
    """Say which linear layers quantization hurts most, alone and within the whole model, and why."""
    try:
        widths = [int(width) for width in bits.split(",")]
    except ValueError:
        widths = []
    with _progress(quiet=as_json) as progress:
        found = measure_sensitivity(
            source, recipe=recipe, bits=widths, top=top, calibration=calibration, progress=progress
        )
    if as_json:
        _print_json(asdict(found))
    else:
        _print_sensitivity(found)
    if plot_file is not None:
        _write_text(plot_file, plot(found).svg())


@app.command("diff")
def diff_command(
    first: Annotated[Path, typer.Argument(help="An .onnx file, or a folder with model.onnx in it.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far float constants may be apart, relative to the largest of each.")
    ] = 0.0,
    ignore_metadata: Annotated[
        bool, typer.Option("--ignore-metadata", help="Leave out producer, documentation and metadata of the models.")
    ] = False,
    quantization: Annotated[
        bool, typer.Option("--quantization", help="Compare only how the linear layers are quantized, in whatever form.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare two models by what they compute, not by names; exit code 0 when they are equal, 1 when they differ."""
    found = diff_files(first, second, tolerance=tolerance, metadata=not ignore_metadata)
    if quantization:
        found = found.only_quantization()
    if as_json:
        _print_json(found.facts())
    else:
        print(found.summary())
    if not found.equal:
        sys.exit(1)


@app.command("eval")
def eval_command(
    folder: Annotated[Path, typer.Argument(help="A compiled folder, or an .onnx file with tokenizer.json beside it.")],
    data: Annotated[
        Path,
        typer.Option(
            help="sts: a file of the STS benchmark; perplexity, agreement: running text; masked, fidelity: one text a"
            " line; classification: text, tab, label a line, or JSON lines with text and label."
        ),
    ],
    metric: Annotated[str, typer.Option(help=f"{', '.join(evaluate.METRICS)}.")] = "sts",
    against: Annotated[
        str | None, typer.Option(help="The float model: a hub id, folder, .onnx file or reference model's name.")
    ] = None,
    window: Annotated[int, typer.Option(help="perplexity, agreement: tokens of a window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(help="perplexity, agreement: tokens from window to window; default: no overlap.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="perplexity, agreement: take the first so many; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="masked: which tokens are masked.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure a compiled model, and the float model beside it where --against gives one."""
    if metric not in evaluate.METRICS:
        choices = ", ".join(evaluate.METRICS)
        raise SourceError(f"there is no metric {metric!r}", where="--metric", remedy=f"choose from {choices}")
    with _progress(quiet=as_json) as progress:
        request = evaluate.Request(folder, data, against, window, stride, windows, seed, progress)
        facts = evaluate.METRICS[metric](request)
    if as_json:
        _print_json(facts)
    else:
        table = Table("measure", "value")
        for name, value in facts.items():
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
        Console().print(table)


@app.command("generate")
def generate_command(
    folder: Annotated[Path, typer.Argument(help="A compiled decoder, or an .onnx file with tokenizer.json beside it.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens at the latest.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; above it tokens are drawn (needs transformers).")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw only from so many of the likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw only from the likeliest tokens that reach this probability together.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a compiled decoder; the text goes to stdout as it comes, its speed to stderr."""

    def show(index: int, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    sampling = Sampling(temperature, top_k, top_p, seed)
    written = Generator(folder).generate(
        [prompt], max_new_tokens=max_new_tokens, sampling=sampling, show=(lambda *_: None) if as_json else show
    )
    if as_json:
        _print_json({**asdict(written), "tokens_per_second": written.tokens_per_second})
        return
    sys.stdout.write("\n")
    (continuation,) = written.continuations
    errors.print(
        f"{written.new_tokens} tokens after {written.prompt_tokens} of the prompt, stopped by {continuation.stopped};"
        f" prompt {written.prefill_seconds:.2f} s, then {written.tokens_per_second:.1f} tokens/s",
        soft_wrap=True,
        highlight=False,
    )


@app.command("bench")
def bench_command(
    folder: Annotated[Path, typer.Argument(help="A folder that `scalefold compile` wrote, or an .onnx file.")],
    shape: Annotated[list[str] | None, typer.Option(help="BATCHxTOKENS; may be repeated; default: 1x128.")] = None,
    past: Annotated[int, typer.Option(min=0, help="Positions in a decoder's cache in front of them.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="0 lets onnxruntime choose.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="How often each shape is run.")] = 20,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also: the time of every layer and operator, against this machine's best.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure this machine's ceilings again.")] = False,
    as_json: Json = False,
) -> None:
    """Time a model on random tokens, and say for each layer and operator how much of this machine it reaches."""
    timed = [
        bench.latency(folder, bench.parse_shape(text, past), threads=threads, runs=runs) for text in shape or ["1x128"]
    ]
    best = ceilings(threads, fresh=fresh) if profile else None
    profiles = [] if best is None else [bench.profile(folder, entry, best, threads=threads) for entry in timed]
    if as_json:
        _print_json(
            {"latencies": [asdict(entry) for entry in timed], "profiles": [entry.facts() for entry in profiles]}
        )
        return
    _print_latencies(timed)
    for entry in profiles:
        _print_profile(entry)


@app.command("tune")
def tune_command(
    folder: Annotated[Path, typer.Argument(help="A folder that `scalefold compile` wrote.")],
    data: Annotated[
        Path, typer.Option(help="JSON lines with prompt and target, or text; classification: with text and label.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The adapter's folder; an unfinished run goes on.")],
    task: Annotated[str, typer.Option(help="causal-lm or classification.")] = "causal-lm",
    train: Annotated[
        str,
        typer.Option(
            help="alpha1 (the largest alpha of binary-coded weights), alphas (all of them), scales (of columns), or"
            " codebooks (of k-means weights)."
        ),
    ] = "alpha1",
    epochs: Annotated[int, typer.Option(help="Times that every sample is seen.")] = 5,
    lr: Annotated[float, typer.Option(help="Learning rate at the start; it falls linearly to 0.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Samples a step.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the samples, and of which are held out.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    max_length: Annotated[int, typer.Option(help="Most tokens of a sample.")] = 256,
    held_out: Annotated[float, typer.Option(help="Share of the samples that only judge.")] = 0.1,
    group_gradients: Annotated[
        bool, typer.Option(help="Divide gradients by the number of weights that share what is trained.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Tune a compiled model for a task by its scaling factors alone, and write them as an adapter."""
    if task not in get_args(Task):
        raise SourceError(f"there is no task {task!r}", where="--task", remedy="choose causal-lm or classification")
    if train not in get_args(Train):
        choices = ", ".join(get_args(Train))
        raise SourceError(f"{train!r} cannot be trained", where="--train", remedy=f"choose from {choices}")
    with needing_packages("tuning", "pip install 'scalefold[hf]'"):
        from scalefold.compiler import tuning
    settings = tuning.Settings(
        cast(Train, train), epochs, lr, batch, seed, weight_decay, max_length, held_out, group_gradients
    )
    with _progress(quiet=as_json) as progress:
        report = tuning.tune(folder, output, data, task=cast(Task, task), settings=settings, progress=progress)
    if as_json:
        _print_json({**asdict(report), "output": str(report.output)})
        return
    table = Table("measure", "value")
    for name, value in asdict(report).items():
        table.add_row(name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the named recipes."""
    loaded = [load_recipe(name) for name in named_recipes()]
    if as_json:
        _print_json({recipe.name: recipe.model_dump(mode="json") for recipe in loaded})
        return
    table = Table("recipe", "what it does")
    for recipe in loaded:
        table.add_row(recipe.name, recipe.summary)
    table.add_row(AUTO, "compile only: format, bits and granularity of every layer by measurement, for a target")
    Console().print(table)
    Console().print(f"reference models: {', '.join(reference_models())}")


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and a non-zero exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app(standalone_mode=False)
    except (ScalefoldError, InterruptError) as error:
        _fail(error)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except Exception as error:
        # typer's usage errors come from the copy of click inside it, whose classes are not public
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or code is None:
            raise
        show()
        sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop by our own error: of KeyboardInterrupt typer makes an exit without an exit code."""
    raise InterruptError("it was interrupted", where="scalefold", remedy="earlier output is whole; run it again")


def _fail(error: ScalefoldError | InterruptError) -> None:
    errors.print(f"[bold red]error[/] {_escape(str(error))}", soft_wrap=True, highlight=False)
    sys.exit(error.exit_code)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[..., Any]]:
    """A factory of progress bars on stderr; none where nobody looks, or where only machines do."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, disable=quiet or not errors.is_terminal) as bars:

        @contextlib.contextmanager
        def open_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
            task = bars.add_task(title, total=total)
            yield lambda: bars.advance(task)
            bars.update(task, completed=total)

        yield open_bar


def _checked_gates(path: Path, kernels: Sequence[verify.LayerKernel]) -> list[Gate]:
    """The gates of a compiled model, on one sample of the default text."""
    model = read_onnx(path)
    tokenizer = path.parent / "tokenizer.json"
    sample = calibrate.calibration_from(
        None, model, tokenizer_file=tokenizer if tokenizer.is_file() else None, samples=1, max_length=PARITY_TOKENS
    )
    return run_gates(model, Session(path), sample.head(1)[0], rounds_rows=verify.rounds_rows(kernels))


def _gate_line(gate: Gate) -> str:
    verdict = "holds" if gate.passed else "[red]does not hold[/red]"
    return f"{verdict} ({gate.detail}: {gate.figure:.2g}, limit {gate.limit:g})"


def _print_report(report: CompileReport) -> None:
    console = Console()
    if report.output is None:
        table = Table("linear layer", "K x N", title=f"dry run: {len(report.layers)} linear layers would be quantized")
        for layer in report.layers:
            table.add_row(layer.name, f"{layer.shape[0]} x {layer.shape[1]}")
        console.print(table)
        console.print(f"size  {report.float_bytes / 1e6:.1f} MB float -> about {report.bytes / 1e6:.1f} MB")
        return
    sqnr = {layer.name: layer.sqnr_db for layer in report.layers}
    kernels = [
        verify.LayerKernel(layer.name, layer.shape, True, layer.kernel, layer.integer, activation=layer.activation)
        for layer in report.layers
    ]
    _print_kernels(kernels, sqnr)
    _print_outputs(report.outputs, report.held_out)
    summary = Table(show_header=False, title=f"{report.source} -> {report.output}")
    summary.add_row("recipe, target", f"{report.recipe}, {report.target}")
    summary.add_row("calibrated on", f"{report.calibration['samples']} samples of {report.calibration['origin']}")
    every = [layer.shape for layer in report.layers]
    summary.add_row("integer kernels", f"{report.integer_layers} of {len(report.layers)} linear layers")
    exceptions = {
        "in two codes": [layer.shape for layer in report.layers if layer.activation == "two codes"],
        "ranges per token": [layer.shape for layer in report.layers if layer.activation == "per-token"],
        "in float": [layer.shape for layer in report.layers if not layer.integer],
    }
    for title, found in exceptions.items():
        if found:
            share = sum(k * n for k, n in found) / sum(k * n for k, n in every)
            summary.add_row(title, f"{len(found)} layers, {share:.1%} of the linear multiply-adds")
    for gate in report.gates:
        summary.add_row(gate.name, _gate_line(gate))
    ratio = report.bytes / max(report.float_bytes, 1)
    summary.add_row("size", f"{report.bytes / 1e6:.1f} MB, {ratio:.3f} of float's {report.float_bytes / 1e6:.1f} MB")
    for name, part in report.parts.items():
        if part.elements:
            summary.add_row(f"  {name}", f"{part.bits_per_element:.2f} bits each")
    summary.add_row("loads in", f"{report.load_seconds:.2f} s")
    slowest = sorted(report.seconds.items(), key=lambda item: -item[1])[:4]
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in slowest)
    summary.add_row("took", f"{sum(report.seconds.values()):.1f} s ({stages})")
    summary.add_row(
        "peak memory", f"{report.peak_bytes / 1e6:.0f} MB, and {report.export_peak_bytes / 1e6:.0f} MB to export"
    )
    for entry in report.passes:
        if entry.rewrites or entry.declined:
            reasons = ", ".join(sorted({str(event["reason"]) for event in entry.declined}))
            declined = f", {len(entry.declined)} declined ({reasons})" if entry.declined else ""
            done = {str(event["reason"]) for event in entry.rewrites}
            said = f" ({done.pop()})" if len(entry.rewrites) == 1 else ""
            summary.add_row(entry.name, f"{len(entry.rewrites)} rewrites{said}{declined}")
    console.print(summary)
    if report.search is not None:
        _print_search(report.search, report.output / RECIPE)
    for note in report.notes:
        console.print(f"note: {_escape(note)}")


def _print_search(found: Search, recipe: Path) -> None:
    rows = " and ".join(str(number) for number in found.rows)
    table = Table(
        "error", "file, MB", f"linear layers, ms (mean over {rows} rows)", Column("layers", overflow="fold"),
        title=f"what can be had: {found.measure} against size and time",
    )  # fmt: skip
    for point in found.front:
        mark = ", chosen" if point == found.chosen else "" if point.measured else ", estimated"
        layers = ", ".join(f"{count} x {choice}" for choice, count in point.layers.items())
        table.add_row(f"{point.error:.3g}{mark}", f"{point.bytes / 1e6:.2f}", f"{1e3 * point.seconds:.3g}", layers)
    console = Console()
    console.print(table)
    if found.held_out_error is not None:
        console.print(f"error of the compiled model on samples held out: {found.held_out_error:.3g}", highlight=False)
    console.print(
        f"the choices are in {recipe}, which compiles again without a search", soft_wrap=True, highlight=False
    )


def _print_kernels(kernels: Sequence[verify.LayerKernel], sqnr: dict[str, float | None]) -> None:
    table = Table("linear layer", "K x N", "kernel", "SQNR dB", title="what onnxruntime runs each linear layer with")
    several = len({kernel.activation for kernel in kernels}) > 1
    if several:
        table.add_column("range")
    for kernel in kernels:
        mark = "" if kernel.integer or not kernel.planned else " [red](missed)[/]"
        value = sqnr.get(kernel.name)
        size = f"{kernel.shape[0]} x {kernel.shape[1]}"
        row = [kernel.name, size, kernel.kernel + mark, "" if value is None else f"{value:.1f}"]
        table.add_row(*row, *([kernel.activation] if several else []))
    Console().print(table)


def _print_outputs(outputs: Sequence[verify.Fidelity], held_out: str, *, against: str = "float") -> None:
    if not outputs:
        return
    table = Table(
        "output", "mean cosine", "min cosine", "max error", "SQNR dB", title=f"against {against} on {held_out}"
    )
    for entry in outputs:
        figures = (
            f"{entry.mean_cosine:.5f}",
            f"{entry.min_cosine:.5f}",
            f"{entry.max_error:.4f}",
            f"{entry.sqnr_db:.1f}",
        )
        table.add_row(entry.name, *figures)
    Console().print(table)


def _print_sensitivity(found: Sensitivity) -> None:
    console = Console()
    for index, (width, total) in enumerate(found.whole.items()):
        title = f"{width} bits: all layers quantized give {total:.4g} ({found.measure})"
        table = Table(
            Column("linear layer", overflow="fold"),
            "SQNR dB",
            "of weight",
            "of input",
            "alone",
            "gain if float",
            title=title,
        )
        for layer in found.layers:
            error = layer.errors[index]
            figures = (error.sqnr_db, error.weight_sqnr_db, error.input_sqnr_db)
            whole = ("" if value is None else f"{value:.3g}" for value in (error.alone, error.gain))
            table.add_row(layer.name, *(f"{value:.1f}" for value in figures), *whole)
        console.print(table)
    table = Table(
        Column("linear layer", overflow="fold"),
        "largest |x|",
        "largest / median channel",
        "kurtosis",
        title="what each layer reads",
    )
    for layer in found.layers:
        table.add_row(layer.name, f"{layer.largest:.4g}", f"{layer.spread:.1f}", f"{layer.kurtosis:.1f}")
    console.print(table)


def _print_latencies(timed: Sequence[bench.Latency]) -> None:
    table = Table("batch x tokens", "fastest, ms", "median, ms", "quartiles, ms", "runs", "load, s")
    for entry in timed:
        least, low, middle, high = (f"{1000 * value:.2f}" for value in entry.seconds)
        table.add_row(str(entry.shape), least, middle, f"{low}, {high}", str(entry.runs), f"{entry.load_seconds:.2f}")
    Console().print(table)


def _print_profile(found: bench.Profile) -> None:
    best = found.ceilings
    table = Table(
        Column("linear layers", overflow="fold"), "operator", "nodes", "ms", "share", "achieved", "ceiling", "reached",
        "bound by", title=f"{found.shape}: where the {1000 * found.seconds:.2f} ms go",
    )  # fmt: skip
    small = [line for line in found.lines if line.share < SMALL_SHARE]
    for line in found.lines:
        if line in small:
            continue
        rates = (f"{line.rate:.3g} {line.unit}", f"{line.ceiling:.3g}", f"{line.reached:.0%}")
        name = f"{line.layer} {line.size}".strip()
        table.add_row(
            name, line.kernel, str(line.nodes), f"{1000 * line.seconds:.3f}", f"{line.share:.1%}", *rates, line.bound
        )
    if small:
        rest = sum(line.seconds for line in small)
        count = str(sum(line.nodes for line in small))
        table.add_row("", "others", count, f"{1000 * rest:.3f}", f"{rest / found.seconds:.1%}")
    table.add_row("between nodes", "", "", f"{1000 * found.between:.3f}", f"{found.between / found.seconds:.1%}")
    Console().print(table)
    Console().print(
        f"this machine's best: {best.integer / 1e9:.0f} integer and {best.floating / 1e9:.0f} float GOPS,"
        f" {best.memory / 1e9:.1f} GB/s from memory, {best.cache / 1e9:.1f} from cache, {1e6 * best.node:.1f} us a node",
        highlight=False,
        soft_wrap=True,
    )


def _print_json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=2, default=str))


if __name__ == "__main__":
    main()
