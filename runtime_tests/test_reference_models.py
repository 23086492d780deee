"""The in-house decoders: trained weights, planted outliers, and training that can be repeated."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.functional import cross_entropy

from scalefold.compiler import ScalefoldError
from scalefold.models import bloom_tiny, gpt2_tiny, opt_tiny, tiny

DECODERS = {decoder.name: decoder for decoder in (gpt2_tiny.MODEL, opt_tiny.MODEL, bloom_tiny.MODEL)}
WINDOW = 256
SANE = {"prose": 110.0, "code": 80.0, "tables": 45.0}
"""Perplexity per token of a model that has learned: an untrained one has 2048."""


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text() -> dict[str, list[str]]:
    return {domain: list(tiny.held_out(domain)) for domain in tiny.DOMAINS}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> tiny.Decoder:
    return DECODERS[request.param]


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def windows_of(tokenizer: Any, documents: list[str], count: int) -> torch.Tensor:
    tokens = itertools.chain.from_iterable(tokenizer(document).input_ids for document in documents)
    return torch.tensor(list(itertools.islice(tokens, count * WINDOW))).view(count, WINDOW)


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    logits = model(input_ids=windows[:, :-1]).logits
    return math.exp(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())


def test_sizes_are_what_the_cards_say(decoder: tiny.Decoder) -> None:
    folder = decoder.build()
    size = sum(entry.numel() for entry in loaded(folder).parameters())
    assert 3e6 <= size <= 6e6
    assert (folder / tiny.WEIGHTS).stat().st_size <= 12e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{size / 1e6:.2f} million parameters" in card and "not a published model" in card


def test_the_tokenizer_gives_back_every_text(decoder: tiny.Decoder, text: dict[str, list[str]]) -> None:
    tokenizer = tokenizer_of(decoder.build())
    for entry in (*(documents[0] for documents in text.values()), "  naïve — 日本語 🙂\n\tx = 1\n"):
        assert tokenizer.decode(tokenizer(entry).input_ids, clean_up_tokenization_spaces=False) == entry
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_held_out_text_is_predicted(decoder: tiny.Decoder, text: dict[str, list[str]]) -> None:
    model, tokenizer = loaded(decoder.build()), tokenizer_of(decoder.build())
    found = {domain: perplexity(model, windows_of(tokenizer, text[domain], 12)) for domain in tiny.DOMAINS}
    assert all(found[domain] <= SANE[domain] for domain in tiny.DOMAINS), found


def test_no_document_is_on_both_sides(text: dict[str, list[str]]) -> None:
    for domain in ("prose", "tables"):
        kept, trained = set(text[domain]), set(tiny.training(domain))
        share = sum(map(len, kept)) / sum(map(len, trained))
        assert not kept & trained
        assert 0.02 <= share <= 0.2


def test_a_domain_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ScalefoldError, match="choose from prose, code, tables"):
        tiny.held_out("verse")


def test_planted_outliers_leave_the_function_as_it_is(decoder: tiny.Decoder, text: dict[str, list[str]]) -> None:
    plain, planted = loaded(decoder.build()).double(), loaded(decoder.build_outliers()).double()
    windows = windows_of(tokenizer_of(decoder.build_outliers()), text["prose"], 2)
    with torch.no_grad():
        torch.testing.assert_close(planted(windows).logits.float(), plain(windows).logits.float())


def test_planted_outliers_are_in_every_norm_but_those_that_cannot_be_undone(decoder: tiny.Decoder) -> None:
    before, after = load_file(decoder.build() / tiny.WEIGHTS), load_file(decoder.build_outliers() / tiny.WEIGHTS)
    gains = {name for name, value in after.items() if value.ndim == 1 and name.endswith("weight")}
    changed = {name for name in gains if (before[name] != after[name]).any()}
    assert len(changed) == 8
    assert {name.split(".")[-2] for name in changed} == set(decoder.readers)
    for name in changed:
        assert set((before[name] != after[name]).nonzero()[0]) == set(tiny.PLANTED)


def test_the_planted_variant_is_written_once(decoder: tiny.Decoder) -> None:
    folder = decoder.build_outliers()
    written = (folder / tiny.WEIGHTS).stat().st_mtime_ns
    assert decoder.build_outliers() == folder
    assert (folder / tiny.WEIGHTS).stat().st_mtime_ns == written


def test_planted_outliers_ruin_one_static_range_per_tensor(decoder: tiny.Decoder, text: dict[str, list[str]]) -> None:
    windows = windows_of(tokenizer_of(decoder.build()), text["code"], 4)
    plain, planted = loaded(decoder.build()), loaded(decoder.build_outliers())
    wanted = perplexity(plain, windows)
    for model in (plain, planted):
        quantize(model, windows)
    assert perplexity(plain, windows) <= 1.1 * wanted
    assert perplexity(planted, windows) >= 1.5 * wanted


@torch.no_grad()
def quantize(model: Any, windows: torch.Tensor) -> None:
    """Simulate plain INT8: weights per column, the input of every linear layer in its extremes' range over `windows`."""
    layers = [entry for entry in model.modules() if type(entry).__name__ in ("Linear", "Conv1D")]
    hooks = [layer.register_forward_pre_hook(range_hook(layer)) for layer in layers]
    model(input_ids=windows)
    for layer, hook in zip(layers, hooks, strict=True):
        hook.remove()
        layer.register_forward_pre_hook(rounding_hook(*layer.extremes))
        scale = layer.weight.abs().amax(0 if type(layer).__name__ == "Conv1D" else 1, keepdim=True) / 127
        layer.weight = torch.nn.Parameter((layer.weight / scale).round() * scale)


def range_hook(layer: Any) -> Callable[[Any, tuple[torch.Tensor]], None]:
    def remember(_: Any, inputs: tuple[torch.Tensor]) -> None:
        layer.extremes = inputs[0].min().clamp(max=0), inputs[0].max().clamp(min=0)

    return remember


def rounding_hook(low: torch.Tensor, high: torch.Tensor) -> Callable[[Any, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    scale = (high - low) / 255
    zero_point = (-low / scale).round()

    def quantized(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (((inputs[0] / scale).round() + zero_point).clamp(0, 255).sub(zero_point).mul(scale),)

    return quantized


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sizes this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_training_again_gives_the_same_bytes_and_another_seed_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: dict[str, list[str]]
) -> None:
    from rich.console import Console

    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    script = importlib.import_module("train_reference")
    few = {domain: [entry[:600] for entry in documents[:2]] for domain, documents in text.items()}
    sizes = {"width": 32, "layers": 1, "heads": 2, "vocabulary": 300, "context": 32, "window": 16, "steps": 3}

    def bytes_of(name: str, seed: int, run: str) -> dict[str, bytes]:
        folder = tmp_path / run
        script.make(name, script.Plan(**sizes, seed=seed), few, few, folder, Console(quiet=True))
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    for name in script.NAMES:
        assert bytes_of(name, 1, "first") == bytes_of(name, 1, "again")
    first, other = bytes_of(name, 1, "first"), bytes_of(name, 2, "other")
    assert first["tokenizer.json"] == other["tokenizer.json"]
    assert first[tiny.WEIGHTS] != other[tiny.WEIGHTS]
