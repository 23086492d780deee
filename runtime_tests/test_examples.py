"""The examples: the files they write and what the server refuses; the slow tests run each where it belongs."""

from __future__ import annotations

import http.client
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from scalefold.compiler import CompileReport, ScalefoldError, compile_model, load, serving
from scalefold.compiler.artifact import MODEL
from scalefold.compiler.evaluate import embed, open_folder
from scalefold.compiler.fusing import fuse_folder
from scalefold.compiler.generate import Generator
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.kernel_library import LIBRARY
from scalefold.compiler.runtime import Feed
from scalefold.compiler.tunable_weights import tunable_weights

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "scripts" / "examples"
PLACES = ("onnxruntime", "node", "transformers", "sentence-transformers", "fastembed", "infinity")
WITHOUT_LIBRARY = ("node", "infinity")
"""The places that give a session no library of operators."""
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
SENTENCES = ["a value of the type", "it returns the name of a file", "numbers"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a file of the folder by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture(scope="session")
def encoder(compiled: dict[str, CompileReport]) -> Path:
    folder = compiled["onnxruntime-cpu"].output
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def fuse(built_kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Fuse a folder, on any processor."""

    def run(folder: Path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SCALEFOLD_CACHE", str(built_kernels.parent))
            return fuse_folder(folder, tmp_path_factory.mktemp("fused") / "folder", any_cpu=True).output

    return run


@pytest.fixture(scope="session")
def fused_encoder(encoder: Path, fuse: Callable[[Path], Path]) -> Path:
    return fuse(encoder)


@pytest.fixture(scope="session")
def decoder(decoder_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-2 of 64 positions with a tokenizer whose words are w0 to w199."""
    folder = tmp_path_factory.mktemp("served") / "decoder"
    shutil.copytree(decoder_folders["gpt2"], folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(200)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def scales_adapter(base: Path, folder: Path, seed: int) -> Path:
    """An adapter that changes every scale by up to a fifth."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for weight in tunable_weights(read_onnx(base / MODEL)):
        scales = weight.scale_array()
        arrays[weight.scales.name or ""] = (scales * generator.uniform(0.8, 1.2, scales.shape)).astype(np.float32)
    folder.mkdir()
    serving.write_adapter(folder, arrays, {"base": serving.base_digest(base)}, scales_only=True)
    return folder


# The page and the pins ------------------------------------------------------------------------------------------------


def test_every_example_is_there_and_on_the_page(example: Callable[[str], ModuleType]) -> None:
    for name, entry in example("run").EXAMPLES.items():
        folder = EXAMPLES / "node" if entry.environment == "node" else EXAMPLES
        assert (folder / entry.file).is_file()
        assert f"run.py {name}" in PAGE


def test_every_environment_is_pinned(example: Callable[[str], ModuleType]) -> None:
    used = {entry.environment for entry in example("run").EXAMPLES.values()} - {None, "node"}
    files = list((EXAMPLES / "requirements").iterdir())
    assert {file.stem for file in files} == used
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    locked = json.loads((EXAMPLES / "node" / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    wanted = json.loads((EXAMPLES / "node" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert {name: locked[f"node_modules/{name}"]["version"] for name in wanted} == wanted


# Plain onnxruntime ----------------------------------------------------------------------------------------------------


def test_plain_onnxruntime_embeds_as_the_package_does(encoder: Path, example: Callable[[str], ModuleType]) -> None:
    got = example("embed_onnxruntime").embed(encoder, SENTENCES)
    session, tokenizer = open_folder(encoder)
    np.testing.assert_allclose(got, embed(session, tokenizer, SENTENCES, lambda: None), atol=1e-5)


def test_plain_onnxruntime_embeds_with_a_fused_folder(
    fused_encoder: Path, example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, tokenizer = open_folder(fused_encoder)
    wanted = embed(session, tokenizer, SENTENCES, lambda: None)
    monkeypatch.chdir(fused_encoder)
    for folder in (fused_encoder, Path()):
        np.testing.assert_allclose(example("embed_onnxruntime").embed(folder, SENTENCES), wanted, atol=1e-5)


def test_onnxruntime_refuses_int32_ids_as_the_page_says(encoder: Path) -> None:
    ids = np.ones((1, 4), dtype=np.int32)
    feed = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ids)
    message = "Unexpected input data type. Actual: (tensor(int32)) , expected: (tensor(int64))"
    with pytest.raises(Exception, match=re.escape(message)):
        load(encoder).run(None, feed)
    assert message in PAGE


# The files for other servers ------------------------------------------------------------------------------------------


def test_a_triton_repository_holds_the_model_and_its_ports(
    encoder: Path, tmp_path: Path, example: Callable[[str], ModuleType]
) -> None:
    target = example("triton_files").write(encoder, tmp_path, "tiny", max_batch=8, threads=2)
    assert (target / "config.pbtxt").read_text(encoding="utf-8").splitlines() == [
        'name: "tiny"',
        'backend: "onnxruntime"',
        "max_batch_size: 8",
        'input [ { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] } ]',
        'input [ { name: "token_type_ids" data_type: TYPE_INT64 dims: [ -1 ] } ]',
        'input [ { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] } ]',
        'output [ { name: "last_hidden_state" data_type: TYPE_FP32 dims: [ -1, 64 ] } ]',
        'output [ { name: "pooler_output" data_type: TYPE_FP32 dims: [ 64 ] } ]',
        "instance_group [ { kind: KIND_CPU count: 1 } ]",
        'parameters { key: "intra_op_thread_count" value { string_value: "2" } }',
    ]
    load(target / "1")
    assert (encoder / "model.onnx.data").stat().st_nlink == 1
    with pytest.raises(ScalefoldError, match="a model of this name is there already"):
        example("triton_files").write(encoder, tmp_path, "tiny")
    with pytest.raises(ScalefoldError, match=r"there is no model\.onnx"):
        example("triton_files").write(tmp_path, tmp_path, "none")


def test_triton_finds_the_library_by_the_path_of_the_server(
    fused_encoder: Path, tmp_path: Path, example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = example("triton_files")
    target = script.write(fused_encoder, tmp_path, "tiny")
    operators = re.compile(r'^model_operations \{ op_library_filename: "(.+)" \}$', re.MULTILINE)
    found = operators.findall((target / "config.pbtxt").read_text(encoding="utf-8"))
    assert found == [str(tmp_path / "tiny" / "1" / LIBRARY)]
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(found[0])  # Triton's backend calls this with the string that it was given
    onnxruntime.InferenceSession(target / "1" / MODEL, options)
    monkeypatch.chdir(target / "1")
    with pytest.raises(Exception, match="cannot open shared object file"):
        onnxruntime.SessionOptions().register_custom_ops_library(LIBRARY)
    target = script.write(fused_encoder, tmp_path, "other", served_from=Path("/mnt/models"))
    text = (target / "config.pbtxt").read_text(encoding="utf-8")
    assert operators.findall(text) == [f"/mnt/models/other/1/{LIBRARY}"]


@pytest.mark.parametrize(("family", "heads"), [("gpt2", 4), ("llama", 2)])
def test_genai_gets_the_names_and_sizes_of_the_cache(
    decoder_folders: dict[str, Path], tmp_path: Path, example: Callable[[str], ModuleType], family: str, heads: int
) -> None:
    folder = tmp_path / family
    shutil.copytree(decoder_folders[family], folder)
    config = json.loads(example("genai_files").write(folder).read_text(encoding="utf-8"))
    inner = config["model"]["decoder"]
    assert inner["inputs"]["past_key_names"] == "input.past_key_values.layers.%d.keys"
    assert inner["outputs"]["present_value_names"] == "output.past_key_values.layers.%d.values"
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    assert [inner[name] for name in sizes] == [16, 64, 4, 2, heads]
    assert config["model"]["context_length"] == config["search"]["max_length"] == 64
    assert not config["search"]["past_present_share_buffer"]
    assert inner["session_options"] == {"provider_options": []}
    (folder / LIBRARY).touch()
    config = json.loads(example("genai_files").write(folder).read_text(encoding="utf-8"))
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == LIBRARY


def test_an_encoder_is_no_model_for_genai(encoder: Path, example: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ScalefoldError, match="it is not a decoder"):
        example("genai_files").write(encoder)


def test_kserve_gets_triton_and_a_name_it_can_take(
    capsys: pytest.CaptureFixture[str], example: Callable[[str], ModuleType]
) -> None:
    example("kserve_files").main(["minilm", "pvc://models/repository", "--cpus", "4"])
    text = capsys.readouterr().out
    assert "runtime: kserve-tritonserver\n" in text and "storageUri: pvc://models/repository\n" in text
    assert text.count("cpu: '4'") == 2
    with pytest.raises(SystemExit, match="no name that Kubernetes takes"):
        example("kserve_files").main(["Mini_LM", "pvc://models/repository"])


# The HTTP server's models ---------------------------------------------------------------------------------------------


def tensor(datatype: str = "INT64", shape: tuple[int, int] = (1, 3), last: int = 3) -> dict[str, Any]:
    data = [2] * (shape[0] * shape[1] - 1) + [last]
    return {"name": "input_ids", "datatype": datatype, "shape": list(shape), "data": data}


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "The request has neither `texts` nor `inputs`; send one of them."),
    ({"texts": []}, 400, "`texts` is not a list of at least one string; send such a list."),
    ({"texts": ["a"] * 65}, 413, "The batch has 65 rows and at most 64 are taken; send it in parts."),
    (
        {"inputs": [tensor("INT32")]},
        400,
        "input_ids is INT32 and the model takes INT64; convert it, for the server does not.",
    ),
    ({"inputs": [tensor(shape=(65, 3))]}, 413, "The batch has 65 rows and at most 64 are taken; send it in parts."),
    (
        {"inputs": [tensor(shape=(1, 65))]},
        413,
        "The rows are 65 tokens long and the model takes 64; send shorter ones.",
    ),
    ({"inputs": [tensor(last=200)]}, 400, "input_ids must be from 0 to 199, the model's vocabulary."),
    (
        {"inputs": [{**tensor(), "shape": [2, 3]}]},
        400,
        "The data of input_ids are not integers that fill its shape [batch, tokens].",
    ),
    (
        {"inputs": [tensor(), {**tensor(), "name": "attention_mask"}]},
        400,
        "attention_mask must be 0 or 1 for every id, and 1 at least once a row.",
    ),
    (
        {"inputs": [{**tensor(), "name": "ids"}]},
        400,
        "`inputs` must hold input_ids, may hold attention_mask, and nothing else.",
    ),
    ({"inputs": "ids"}, 400, "`inputs` is not a list of tensors; send name, datatype, shape and data of each."),
    ({"texts": ["a"], "adapter": "tone"}, 404, "There is no adapter 'tone'; this model has: none."),
]


def test_what_the_embedding_endpoint_refuses(encoder: Path, example: Callable[[str], ModuleType]) -> None:
    served = example("served_models")
    model = served.EmbeddingModel(encoder, {}, 1)
    for request, status, sentence in REFUSED:
        with pytest.raises(served.RefusedError) as refused:
            model.prepare(request)
        assert (refused.value.status, refused.value.sentence) == (status, sentence)


def test_texts_and_their_ids_embed_alike(encoder: Path, example: Callable[[str], ModuleType]) -> None:
    model = example("served_models").EmbeddingModel(encoder, {}, 1)
    feed, adapter = model.prepare({"texts": SENTENCES})
    inputs = [
        {"name": name, "datatype": "INT64", "shape": list(feed[name].shape), "data": feed[name].tolist()}
        for name in ("input_ids", "attention_mask")
    ]
    given, _ = model.prepare({"inputs": inputs})
    np.testing.assert_array_equal(model.embed(given, None), model.embed(feed, adapter))
    wanted = example("embed_onnxruntime").embed(encoder, SENTENCES)
    np.testing.assert_allclose(model.embed(feed, None), wanted, atol=1e-5)


def test_the_server_embeds_with_a_fused_folder(fused_encoder: Path, example: Callable[[str], ModuleType]) -> None:
    model = example("served_models").EmbeddingModel(fused_encoder, {}, 1)
    wanted = example("embed_onnxruntime").embed(fused_encoder, SENTENCES)
    np.testing.assert_allclose(model.embed(*model.prepare({"texts": SENTENCES})), wanted, atol=1e-5)


def test_each_request_has_its_adapter(encoder: Path, tmp_path: Path, example: Callable[[str], ModuleType]) -> None:
    served = example("served_models")
    adapters = {name: scales_adapter(encoder, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    model = served.EmbeddingModel(encoder, adapters, 1)

    def states(adapter: str | None) -> Any:
        feed, chosen = model.prepare({"texts": SENTENCES, "adapter": adapter})
        return np.array(model.embed(feed, chosen))

    feed: Feed = model.prepare({"texts": SENTENCES})[0]
    for adapter in ("one", None, "two", "one"):
        folder = None if adapter is None else adapters[adapter]
        own = load(encoder, folder).run(["last_hidden_state"], dict(feed))[0]
        weights = feed["attention_mask"][..., None]
        means = (own * weights).sum(axis=1)
        np.testing.assert_allclose(states(adapter), means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-5)
    assert np.abs(states("one") - states("two")).max() > 1e-2
    with pytest.raises(served.RefusedError, match="There is no adapter 'three'; this model has: one, two"):
        model.prepare({"texts": ["a"], "adapter": "three"})


def test_another_models_adapter_is_found_before_the_server_starts(
    encoder: Path, tmp_path: Path, example: Callable[[str], ModuleType]
) -> None:
    served = example("served_models")
    adapter = scales_adapter(encoder, tmp_path / "adapter", 1)
    served.check_adapters(encoder, {"a": adapter})
    (tmp_path / MODEL).write_bytes(b"another")
    with pytest.raises(ScalefoldError, match="it was tuned on another model"):
        served.check_adapters(tmp_path, {"a": adapter})
    with pytest.raises(ScalefoldError, match=r"there is no model\.onnx"):
        served.check_adapters(tmp_path / "none", {})


def test_generation_over_the_server_equals_the_packages(decoder: Path, example: Callable[[str], ModuleType]) -> None:
    model = example("served_models").GenerationModel(decoder, {}, 1)
    ids, new, adapter = model.prepare({"prompt": "w3 w14 w15 w92", "max_new_tokens": 9})
    found = model.generate(ids, new, adapter)
    wanted = Generator(decoder).generate(["w3 w14 w15 w92"], max_new_tokens=9).continuations[0]
    assert (ids, found["tokens"]) == ([3, 14, 15, 92], list(wanted.tokens))


def test_what_the_generation_endpoint_refuses(decoder: Path, example: Callable[[str], ModuleType]) -> None:
    served = example("served_models")
    model = served.GenerationModel(decoder, {}, 1)
    faults: list[tuple[dict[str, Any], int, str]] = [
        ({"prompt": ""}, 400, "`prompt` is not a text of at least one token; send some text."),
        ({"prompt": 3}, 400, "`prompt` is not a text of at least one token; send some text."),
        (
            {"prompt": "w1", "max_new_tokens": 0},
            400,
            "`max_new_tokens` is not a number from 1 to 256; send such a number.",
        ),
        (
            {"prompt": "w1 " * 60, "max_new_tokens": 5},
            413,
            "The prompt is 60 tokens long and 5 are to follow, where the model has room for 64; send a shorter one.",
        ),
        ({"prompt": "w1", "adapter": ["x"]}, 404, "There is no adapter ['x']; this model has: none."),
    ]
    for request, status, sentence in faults:
        with pytest.raises(served.RefusedError) as refused:
            model.prepare(request)
        assert (refused.value.status, refused.value.sentence) == (status, sentence)
    assert model.prepare({"prompt": "w1 " * 60, "max_new_tokens": 4})[1] == 4


def test_the_load_tables_figures(example: Callable[[str], ModuleType]) -> None:
    script = example("load_test")
    base = script.Endpoint("/embed", b"", [10.0, 20.0, 30.0], [0.001 * index for index in range(1, 201)])
    ours = script.Endpoint("/embed", b"", [20.0, 60.0, 45.0], [0.002])
    text = script.table("/embed", {"float": base, "scalefold": ours})
    assert "| float | 20.0 | 1.00 [1.00, 1.00] | 100.0 | 198.0 |" in text
    assert "| scalefold | 45.0 | 2.00 [1.50, 3.00] | 2.0 | 2.0 |" in text


# Where they belong: real models and the pinned packages ---------------------------------------------------------------


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(EXAMPLES / "run.py"), name, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm") / "compiled"
    compile_model("minilm", folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2") / "compiled"
    compile_model("gpt2-tiny", folder)
    return folder


@pytest.fixture(scope="module")
def fused_minilm(minilm: Path, fuse: Callable[[Path], Path]) -> Path:
    return fuse(minilm)


@pytest.fixture(scope="module")
def fused_gpt2(gpt2: Path, fuse: Callable[[Path], Path]) -> Path:
    return fuse(gpt2)


@pytest.fixture(params=["gpt2", "fused_gpt2"])
def generating(request: pytest.FixtureRequest) -> Path:
    """A decoder as it was compiled, and fused."""
    folder = request.getfixturevalue(request.param)
    assert isinstance(folder, Path)
    return folder


PROMPT = "def read(self, name):"


def continuation(folder: Path) -> str:
    return f"{PROMPT}{Generator(folder).generate([PROMPT], max_new_tokens=24).continuations[0].text}\n"


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_every_place_gives_the_same_similarities(
    minilm: Path, place: str, example: Callable[[str], ModuleType]
) -> None:
    assert_similarities(example, place, minilm)


@pytest.mark.slow
@pytest.mark.parametrize("place", [place for place in PLACES if place not in WITHOUT_LIBRARY])
def test_places_that_take_a_library_give_those_of_a_fused_folder(
    fused_minilm: Path, place: str, example: Callable[[str], ModuleType]
) -> None:
    assert_similarities(example, place, fused_minilm)


@pytest.mark.slow
@pytest.mark.parametrize("place", WITHOUT_LIBRARY)
def test_places_that_take_no_library_miss_its_operators(fused_minilm: Path, place: str) -> None:
    done = run(place, fused_minilm)
    assert done.returncode != 0
    assert re.search(r"scalefold:\w+\(-1\) is not a registered function/op", done.stderr + done.stdout)
    assert "is not a registered function/op" in PAGE


def assert_similarities(example: Callable[[str], ModuleType], place: str, folder: Path) -> None:
    """Check that an example prints what the vectors of plain onnxruntime give."""
    script = example("embed_onnxruntime")
    vectors = script.embed(folder, list(script.SENTENCES))
    done = run(place, folder)
    assert done.returncode == 0, done.stderr
    got = [float(line.split()[0]) for line in done.stdout.splitlines()]
    pairs = ((0, 1), (0, 2), (1, 2))
    np.testing.assert_allclose(got, [vectors[left] @ vectors[right] for left, right in pairs], atol=2e-4)


@pytest.mark.slow
def test_genai_continues_as_the_package_does(generating: Path) -> None:
    assert run("genai-files", generating).returncode == 0
    done = run("genai", generating, PROMPT, 24)
    assert done.returncode == 0, done.stderr
    assert done.stdout == continuation(generating)


@pytest.mark.slow
def test_optimum_continues_as_the_package_does(generating: Path) -> None:
    done = run("optimum", generating, PROMPT, 24)
    assert done.returncode == 0, done.stderr
    assert done.stdout == continuation(generating)


@pytest.mark.slow
def test_the_server_continues_as_the_package_does(generating: Path, example: Callable[[str], ModuleType]) -> None:
    model = example("served_models").GenerationModel(generating, {}, 1)
    found = model.generate(*model.prepare({"prompt": PROMPT, "max_new_tokens": 24}))
    assert f"{PROMPT}{found['text']}\n" == continuation(generating)


@pytest.mark.slow
def test_the_files_fit_the_published_schemas(minilm: Path, gpt2: Path, fused_minilm: Path, tmp_path: Path) -> None:
    for name, folder in (("minilm", minilm), ("gpt2", gpt2), ("fused", fused_minilm)):
        assert run("triton-files", folder, tmp_path / "repository", name, "--served-from", "/models").returncode == 0
        told = run("check-triton", tmp_path / "repository" / name).stdout
        assert f"{name} is valid" in told
        assert (f"library /models/{name}/1/{LIBRARY}\n" in told) == (name == "fused")
    config = tmp_path / "repository" / "minilm" / "config.pbtxt"
    config.write_text(config.read_text(encoding="utf-8").replace("dims", "sizes", 1), encoding="utf-8")
    assert 'no field named "sizes"' in run("check-triton", config.parent).stderr
    service = tmp_path / "service.yaml"
    service.write_text(run("kserve-files", "minilm", "pvc://models/repository").stdout, encoding="utf-8")
    assert "minilm is valid" in run("check-kserve", service).stdout
    service.write_text(service.read_text(encoding="utf-8").replace("storageUri", "storage_uri"), encoding="utf-8")
    assert "model has no storage_uri" in run("check-kserve", service).stderr


@pytest.fixture(scope="module")
def port(minilm: Path, gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A running server of both models, each with one adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        running = importlib.import_module("load_test").running
    folder = tmp_path_factory.mktemp("adapters")
    one, two = scales_adapter(minilm, folder / "one", 1), scales_adapter(gpt2, folder / "two", 2)
    options = [
        "--embed",
        minilm,
        "--embed-adapter",
        f"one={one}",
        "--generate",
        gpt2,
        "--generate-adapter",
        f"two={two}",
    ]
    with running(*map(str, options), "--threads", "1") as found:
        yield found


def post(port: int, path: str, body: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.slow
def test_the_server_answers_with_and_without_adapters(port: int, minilm: Path, gpt2: Path) -> None:
    texts = ["A man is playing a guitar.", "Someone plays an instrument."]
    bodies: list[dict[str, Any]] = [{"texts": texts}, {"texts": texts, "adapter": "one"}, {"texts": texts}]
    plain, adapted, again = (post(port, "/embed", json.dumps(body).encode())[1]["embeddings"] for body in bodies)
    session, tokenizer = open_folder(minilm)
    np.testing.assert_allclose(plain, embed(session, tokenizer, texts, lambda: None), atol=1e-4)
    assert plain == again and np.abs(np.array(plain) - adapted).max() > 1e-2
    prompt: dict[str, Any] = {"prompt": "def read(self, name):", "max_new_tokens": 24}
    wanted = Generator(gpt2).generate([prompt["prompt"]], max_new_tokens=24).continuations[0]
    assert post(port, "/generate", json.dumps(prompt).encode()) == (
        200, {"text": wanted.text, "tokens": list(wanted.tokens)},
    )  # fmt: skip
    status, other = post(port, "/generate", json.dumps({**prompt, "adapter": "two"}).encode())
    assert status == 200 and other["tokens"] != list(wanted.tokens)


@pytest.mark.slow
def test_the_server_refuses_in_one_sentence(port: int) -> None:
    long = {"prompt": "a b c d " * 200}
    faults: list[tuple[str, bytes, int, str]] = [
        ("/embed", json.dumps({"inputs": [tensor("INT32")]}).encode(), 400, "input_ids is INT32"),
        ("/embed", json.dumps({"texts": ["a"] * 65}).encode(), 413, "at most 64 are taken"),
        ("/embed", json.dumps({"texts": ["a"], "adapter": "two"}).encode(), 404, "this model has: one."),
        ("/embed", b'{"texts": [', 400, "The body is not a JSON object"),
        ("/generate", json.dumps(long).encode(), 413, "where the model has room for"),
        ("/generate", json.dumps({"prompt": "a", "adapter": "one"}).encode(), 404, "this model has: two."),
    ]
    for path, body, wanted, sentence in faults:
        status, answer = post(port, path, body)
        assert status == wanted and sentence in answer["detail"] and "\n" not in answer["detail"]


@pytest.mark.slow
def test_the_load_test_runs_every_contender(
    minilm: Path, gpt2: Path, tmp_path: Path, example: Callable[[str], ModuleType]
) -> None:
    for model, folder in (("minilm", minilm), ("gpt2-tiny", gpt2)):
        for name in ("float", "scalefold"):  # that the float one is float matters to the figures alone
            shutil.copytree(folder, tmp_path / model / name)
        shutil.copytree(folder, tmp_path / model / "quantize_dynamic")
    sizes = ("--requests", "4", "--rounds", "1", "--clients", "2", "--threads", "1")
    done = run("load-test", "--decoder", "gpt2-tiny", "--work", tmp_path, "--json", tmp_path / "load.json", *sizes)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))
    counts = {path: {name: len(entry["seconds"]) for name, entry in found.items()} for path, found in record.items()}
    wanted = dict.fromkeys(example("load_test").chosen(), 4)
    assert counts == {"/embed": wanted, "/generate": wanted}


def test_quantize_dynamic_of_the_load_test_is_a_whole_folder(
    float_model: Path, tmp_path: Path, example: Callable[[str], ModuleType]
) -> None:
    example("load_test")._quantize_dynamic(float_model.parent, tmp_path / "out")
    assert {"model.onnx", "tokenizer.json", "config.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert any(node.op_type == "DynamicQuantizeLinear" for node in read_onnx(tmp_path / "out" / MODEL).graph)
    load(tmp_path / "out")
