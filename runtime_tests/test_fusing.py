"""`scalefold fuse`: compiled tiny models on the kernel library give what they gave, and bad input one sentence."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from scalefold.compiler import (
    AdapterSession,
    CompileReport,
    artifact,
    compile_model,
    fusing,
    kernel_library,
    load,
    verify,
)
from scalefold.compiler.decoder import LOGITS, decoder_of
from scalefold.compiler.errors import GraphError, OutputError, ScalefoldError, SourceError
from scalefold.compiler.export import export_model
from scalefold.compiler.fusing import FuseReport, fuse_folder
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.kernel_library import LIBRARY
from scalefold.compiler.runtime import Array, Feed, Session

Cli = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.usefixtures("kernel_cache")


@dataclass(frozen=True)
class Fused:
    """A compiled folder, and the same model on the kernel library."""

    before: Path
    after: Path
    report: FuseReport

    @property
    def operators(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for node in read_onnx(self.after / artifact.MODEL).graph:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        return counts


@pytest.fixture(scope="session")
def fuse(built_kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Fused]:
    """Fuse a folder, once for all tests."""

    def run(folder: Path, data: object = None) -> Fused:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SCALEFOLD_CACHE", str(built_kernels.parent))
            place = tmp_path_factory.mktemp("fused") / folder.name
            report = fuse_folder(folder, place, any_cpu=True, data=data)
        return Fused(folder, place, report)

    return run


@pytest.fixture(scope="session")
def encoder(compiled: dict[str, CompileReport], fuse: Callable[..., Fused]) -> Fused:
    folder = compiled["onnxruntime-cpu"].output
    assert folder is not None
    return fuse(folder)


WORDS = Tokenizer(models.WordLevel({f"w{index}": index for index in range(200)}, unk_token="w0"))
WORDS.pre_tokenizer = pre_tokenizers.Whitespace()


@pytest.fixture(scope="session", params=["llama-throughput", "llama-decode", "llama-token", "gpt2-throughput"])
def decoder(
    request: pytest.FixtureRequest,
    decoder_folders: dict[str, Path],
    fuse: Callable[..., Fused],
    tmp_path_factory: pytest.TempPathFactory,
) -> Fused:
    family, profile = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(decoder_folders[family], folder / "float")
    WORDS.save(str(folder / "float" / "tokenizer.json"))
    source = folder / "float" / artifact.MODEL
    generator, made = np.random.default_rng(4), decoder_of(read_onnx(source))
    feeds = [made.prompt_feed(generator.integers(0, 200, (1, 24))) for _ in range(12)]
    more: dict[str, Any] = {"recipe": "w8a8-token"} if profile == "token" else {"recipe": "w8a8", "profile": profile}
    compile_model(source, folder / "compiled", calibration=feeds, samples=16, **more)
    shutil.copyfile(folder / "float" / "tokenizer.json", folder / "compiled" / "tokenizer.json")
    return fuse(folder / "compiled")


def cosine(first: Array, second: Array) -> float:
    return float((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second))


def test_an_encoder_gives_what_it_gave(encoder: Fused, fresh_feeds: list[Feed]) -> None:
    before, after = (Session(folder / artifact.MODEL) for folder in (encoder.before, encoder.after))
    for feed in fresh_feeds:
        for name, wanted in before.run(feed).items():
            assert cosine(wanted, after.run(feed)[name]) > 0.998
    assert all(output.mean_cosine > 0.998 for output in encoder.report.outputs)


def test_a_sequence_gives_the_same_alone_and_padded_in_a_batch(encoder: Fused, fresh_feeds: list[Feed]) -> None:
    session = Session(encoder.after / artifact.MODEL)
    short = next(feed for feed in fresh_feeds if feed["input_ids"].shape[1] < 30)
    length = short["input_ids"].shape[1]
    padded = {name: np.zeros((2, 37), np.int64) for name in short}
    padded["attention_mask"][1] = 1
    for name, values in short.items():
        padded[name][0, :length] = values[0]
    for name, wanted in session.run(short).items():
        if wanted.ndim == 3:
            assert cosine(wanted[0], session.run(padded)[name][0, :length]) > 0.999


def test_all_of_an_encoder_runs_on_the_library(encoder: Fused) -> None:
    counts = encoder.operators
    assert counts["AttentionUint8"] == counts["LinearBfloat16"] == counts["LinearUint8"] == 2
    assert counts["LinearNormUint8"] >= 3
    assert not {"MatMulIntegerToFloat", "Attention"} & set(counts)  # the last normalization is quantized for nothing
    assert encoder.report.declined == {}
    assert encoder.report.fused["three projections in one product, codes as its output"] == 2


def test_the_folder_is_whole(encoder: Fused) -> None:
    names = {path.name for path in encoder.before.iterdir()}
    assert {path.name for path in encoder.after.iterdir()} == names | {LIBRARY}
    for name in names - {artifact.MODEL, artifact.DATA, artifact.RECORD}:
        assert (encoder.after / name).read_bytes() == (encoder.before / name).read_bytes()
    before, after = (artifact.read_record(folder) for folder in (encoder.before, encoder.after))
    assert after["fused"]["fused"] == encoder.report.fused
    assert after["bytes"] == artifact.size_of(encoder.after)
    assert {name for name in before if before[name] != after[name]} <= {"layers", "bytes"}
    products = {layer["kernel"] for layer in after["layers"]}
    assert products <= kernel_library.PRODUCTS and all(layer["integer"] for layer in after["layers"])
    known = {layer["name"]: layer["sqnr_db"] for layer in before["layers"]}
    assert {layer["sqnr_db"] for layer in after["layers"] if layer["name"] in known} <= set(known.values())


def test_two_runs_give_the_same_bytes(encoder: Fused, tmp_path: Path) -> None:
    fuse_folder(encoder.before, tmp_path / "again", any_cpu=True)
    for name in (artifact.MODEL, artifact.DATA, artifact.RECORD):
        assert (tmp_path / "again" / name).read_bytes() == (encoder.after / name).read_bytes(), name


def test_verify_lists_integer_layers_of_the_library(encoder: Fused, cli: Cli) -> None:
    done = cli("verify", encoder.after, "--json")
    assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout)["layers"]
    assert len(layers) == len(artifact.read_record(encoder.after)["layers"])
    assert all(layer["integer"] and layer["kernel"] in kernel_library.PRODUCTS for layer in layers)


def test_a_decoder_gives_the_logits_it_gave(decoder: Fused) -> None:
    before, after = (Session(folder / artifact.MODEL) for folder in (decoder.before, decoder.after))
    made = decoder_of(before)
    ids = np.random.default_rng(9).integers(0, 200, (2, 30))
    wanted, got = before.run(made.prompt_feed(ids))[LOGITS], after.run(made.prompt_feed(ids))[LOGITS]
    assert cosine(wanted, got) > 0.995
    outputs = after.run(made.prompt_feed(ids[:, :21]))
    steps = [outputs[LOGITS]]
    for start, end in ((21, 22), (22, 23), (23, 30)):
        outputs = after.run(made.prompt_feed(ids[:, start:end], past=made.next_cache(outputs)))
        steps.append(outputs[LOGITS])
    assert cosine(np.concatenate(steps, axis=1), got) > 0.999


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(decoder: Fused, side: str) -> None:
    session = Session(decoder.after / artifact.MODEL)
    made = decoder_of(session)
    for length, kept in ((5, slice(2, None) if side == "left" else slice(None, 3)), (24, slice(9, 20))):
        ids, mask = np.random.default_rng(3).integers(0, 200, (3, length)), np.ones((3, length), dtype=np.int64)
        mask[1] = 0
        mask[1, kept] = 1
        alone = session.run(made.prompt_feed(ids[1:2, kept]))[LOGITS]
        batch = session.run(made.prompt_feed(ids, mask))[LOGITS][1:2, kept]
        assert np.isfinite(batch).all()
        assert cosine(alone, batch) > 0.999


def test_a_decoder_runs_on_the_library(decoder: Fused, cli: Cli) -> None:
    counts = decoder.operators
    split = "llama-token" in str(decoder.before)  # for tokens to add up in one order
    assert counts.get("CachedAttention", 0) == (0 if split else 2)
    assert "Attention" not in counts
    assert counts.get("RowLinear", 0) + counts.get("LinearUint8", 0) > 0 or "decode" in str(decoder.before)
    done = cli("verify", decoder.after, "--json")
    assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout)["layers"]
    assert layers and all(layer["integer"] for layer in layers)


def test_the_gates_of_a_decoder_hold(decoder: Fused, cli: Cli) -> None:
    done = cli("verify", decoder.after, "--gates")
    assert done.returncode == 0, done.stderr


def test_greedy_text_is_the_same(decoder: Fused, cli: Cli) -> None:
    texts = []
    for folder in (decoder.before, decoder.after):
        done = cli("generate", folder, "--prompt", "w5 w90 w17 w3", "--max-new-tokens", "3")
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout.split())
    assert texts[0] and texts[0][:1] == texts[1][:1]


@pytest.mark.slow
def test_layers_that_share_a_weight_are_each_listed(
    fuse: Callable[..., Fused], tmp_path_factory: pytest.TempPathFactory
) -> None:
    import torch
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
    model = AlbertModel(AlbertConfig(vocab_size=100, num_hidden_layers=3, max_position_embeddings=64, **sizes)).eval()
    folder = tmp_path_factory.mktemp("albert")
    export_model(model, folder / "float")
    generator = np.random.default_rng(5)
    feeds = []
    for _ in range(6):
        ids = generator.integers(0, 100, (1, 20))
        feeds.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
    names = [value.name for value in read_onnx(folder / "float" / artifact.MODEL).graph.inputs]
    feeds = [{name: feed[name] for name in feed if name in names} for feed in feeds]
    compile_model(folder / "float" / artifact.MODEL, folder / "compiled", calibration=feeds, samples=6)
    fused = fuse(folder / "compiled", feeds)
    before, after = (len(artifact.read_record(place)["layers"]) for place in (fused.before, fused.after))
    assert before - after in (0, 6)  # three projections are one layer
    assert all(layer.integer for layer in verify.layer_kernels(fused.after / artifact.MODEL))
    assert artifact.size_of(fused.after) < 1.3 * artifact.size_of(fused.before)  # panels are shared as weights were


# Bad input


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def earlier(encoder: Fused, tmp_path: Path) -> Path:
    shutil.copytree(encoder.after, tmp_path / "out")
    return tmp_path / "out"


def assert_refused(folder: Path, output: Path, error: type[ScalefoldError], message: str, **more: Any) -> None:
    """One sentence; what lies at the output and beside it stays as it was."""
    before = {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message) as caught:
        fuse_folder(folder, output, **more)
    assert str(caught.value).endswith(".") and "; " in str(caught.value)
    assert {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()} == before


def test_a_folder_that_was_not_compiled(encoder: Fused, float_model: Path, earlier: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "missing", earlier, OutputError, "there is no readable scalefold.json")
    assert_refused(float_model.parent, earlier, OutputError, "there is no readable scalefold.json")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(encoder.before / artifact.RECORD, bare / artifact.RECORD)
    assert_refused(bare, earlier, SourceError, "there is no model.onnx in it")


def test_what_has_nothing_to_fuse(
    compiled: dict[str, CompileReport], encoder: Fused, earlier: Path, float_model: Path, tmp_path: Path
) -> None:
    portable = compiled["qdq"].output
    assert portable is not None
    assert_refused(portable, earlier, GraphError, r"nothing in it can be fused \(it has no MatMulIntegerToFloat\)")
    assert_refused(encoder.after, earlier, GraphError, "nothing in it can be fused")


def test_weights_alone_have_nothing_to_fuse(float_model: Path, feeds: list[Feed], tmp_path: Path, cli: Cli) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: weights\nweights: {bits: 8}\nactivations: null\nmigration: null\n")
    compile_model(float_model, tmp_path / "weights", recipe=recipe, calibration=feeds[:4], samples=2)
    assert_refused(tmp_path / "weights", tmp_path / "out", GraphError, "nothing in it can be fused", any_cpu=True)


def test_places_that_are_no_output(encoder: Fused, tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    shutil.copytree(encoder.before, folder)
    assert_refused(folder, folder, SourceError, "it is the folder to be fused")
    (tmp_path / "link").symlink_to(folder)
    assert_refused(folder, tmp_path / "link", SourceError, "it is the folder to be fused")
    assert_refused(folder, folder / "fused", SourceError, "lie one in the other")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert_refused(folder, other, OutputError, "the folder holds other files")
    assert_refused(folder, other / "notes.txt", OutputError, "it is not a folder")


def test_a_folder_with_the_output_around_it(encoder: Fused, earlier: Path) -> None:
    shutil.copytree(encoder.before, earlier / "compiled")
    assert_refused(earlier / "compiled", earlier, SourceError, "lie one in the other")


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which nothing has been built."""
    monkeypatch.setenv("SCALEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_machine_without_a_compiler(
    encoder: Fused, earlier: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh_cache))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_refused(encoder.before, earlier, SourceError, r"the machine: there is no C\+\+ compiler to build")
    assert not fresh_cache.exists()


def test_ziglang_is_used_where_there_is_no_other_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "ziglang" else None)
    assert kernel_library._compiler() == (sys.executable, "-m", "ziglang", "c++")


def test_a_compiler_that_refuses_or_is_not_there(
    encoder: Fused, earlier: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("false", "a-compiler-that-is-not-there -q"):
        monkeypatch.setenv("CXX", command)
        assert_refused(encoder.before, earlier, SourceError, f"{command}: the C.. compiler refuses scalefold's kernels")
    assert not [path for path in fresh_cache.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written_to(
    encoder: Fused, earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCALEFOLD_CACHE", str(tmp_path / "file"))
    assert_refused(encoder.before, earlier, SourceError, "the kernel library cannot be kept in it .*SCALEFOLD_CACHE")


def test_a_damaged_library_in_the_cache(encoder: Fused, tmp_path: Path, kernel_cache: Path) -> None:
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(kernel_library.library().read_bytes()[:1000])
    with pytest.raises(SourceError, match="it is no library of scalefold's kernels"):
        kernel_library.is_fast(damaged)


def test_a_processor_without_vnni(encoder: Fused, earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "is_fast", lambda path: False)
    assert_refused(encoder.before, earlier, SourceError, "its processor has no AVX512-VNNI, .* --any-cpu")
    assert fuse_folder(encoder.before, earlier, any_cpu=True).output == earlier


def test_a_damaged_library_beside_the_model(earlier: Path, cli: Cli) -> None:
    whole = (earlier / LIBRARY).read_bytes()
    for content in (b"", b"no library", whole[:1000], whole[:-1000]):
        (earlier / LIBRARY).write_bytes(content)
        with pytest.raises(SourceError, match=r"the library cannot be loaded \(.*; fuse the folder again"):
            Session(earlier / artifact.MODEL)
    done = cli("verify", earlier)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the library cannot be loaded" in done.stderr


def test_a_folder_that_is_the_current_one(
    encoder: Fused, fresh_feeds: list[Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Session(encoder.after / artifact.MODEL).run(fresh_feeds[0])
    monkeypatch.chdir(encoder.after)
    for folder in (Path(), Path(os.curdir)):
        got = Session(folder / artifact.MODEL).run(fresh_feeds[0])
        np.testing.assert_array_equal(got["last_hidden_state"], wanted["last_hidden_state"])


def test_load_opens_it_with_its_library(encoder: Fused, fresh_feeds: list[Feed]) -> None:
    wanted = Session(encoder.after / artifact.MODEL).run(fresh_feeds[0])["last_hidden_state"]
    own = onnxruntime.SessionOptions()
    kernel_library.register_beside(own, encoder.after)
    for options in (None, own):
        got = load(encoder.after, options=options).run(["last_hidden_state"], dict(fresh_feeds[0]))[0]
        np.testing.assert_array_equal(got, wanted)


def test_adapters_want_the_folder_it_was_fused_from(encoder: Fused) -> None:
    with pytest.raises(SourceError, match=r"it has no scales to tune: .*; give the folder it was fused from"):
        AdapterSession(encoder.after)


def test_a_model_without_its_library(earlier: Path, cli: Cli) -> None:
    (earlier / LIBRARY).unlink()
    done = cli("verify", earlier)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot load the graph" in done.stderr


def test_outputs_that_differ_are_refused(encoder: Fused, earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "LEAST_COSINE", 1.1)
    assert_refused(encoder.before, earlier, GraphError, "fused, its output .* has a cosine of", any_cpu=True)


def test_a_full_disk(encoder: Fused, earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact, "save_model", full)
    assert_refused(encoder.before, earlier, OutputError, r"it cannot be written \(the disk is full\)", any_cpu=True)


def test_an_interrupted_run_leaves_the_earlier_output_whole(encoder: Fused, earlier: Path, tmp_path: Path) -> None:
    before = content_of(earlier)
    command = (sys.executable, "-m", "scalefold.compiler.cli", "fuse", str(encoder.before), "-o", "out", "--any-cpu")
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")):
        assert running.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline, "it never began to write"
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130, stderr
    assert "it was interrupted" in stderr and "Traceback" not in stderr
    assert content_of(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_line(encoder: Fused, kernel_cache: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("fuse", encoder.before, "-o", "new", "--any-cpu", SCALEFOLD_CACHE=kernel_cache)
    assert done.returncode == 0, done.stderr
    assert "2 x three projections in one product" in done.stdout
    assert f"register_custom_ops_library('{tmp_path / 'new' / LIBRARY}')" in done.stdout
    told = cli("fuse", encoder.before, "-o", "new", "--any-cpu", "--json", SCALEFOLD_CACHE=kernel_cache)
    assert json.loads(told.stdout)["fused"] == encoder.report.fused
    refused = cli("fuse", encoder.before, "-o", "new", SCALEFOLD_CACHE=tmp_path / "empty", CXX="false")
    assert refused.returncode == 2 and refused.stdout == "" and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("error false: the C++ compiler refuses")
