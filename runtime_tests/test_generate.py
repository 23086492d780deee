"""Tiny random decoders of two families, exported by the compiler, against transformers' own generation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from scalefold.compiler.errors import SourceError
from scalefold.compiler.export import export_model
from scalefold.compiler.generate import CachedSession, Generator, Sampling, chooser

POSITIONS = 48
END = 256
PROMPTS = ["the value of x", "in", "a list ("]
Cli = Callable[..., subprocess.CompletedProcess[str]]


def random_model(family: str) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    ends = {"vocab_size": END + 1, "bos_token_id": None, "eos_token_id": END, "pad_token_id": END}
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, **ends))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=POSITIONS, **ends)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # so large that the text does not repeat one token
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token: its id is its place in the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random decoder, and its folder."""
    from transformers import PreTrainedTokenizerFast

    model, folder = random_model(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "source")
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<end>").save_pretrained(folder / "source")
    export_model(folder / "source", folder / "float", "causal-lm")
    return model, folder / "float"


@pytest.fixture
def generator(family: tuple[Any, Path]) -> Generator:
    return Generator(family[1])


def by_transformers(model: Any, generator: Generator, prompts: list[str], count: int) -> list[list[int]]:
    """The new tokens of greedy generation, each prompt by itself."""
    import torch

    found = []
    for prompt in prompts:
        ids = torch.tensor([generator.tokenizer.encode(prompt).ids])
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def test_greedy_text_is_that_of_transformers_alone_and_in_a_batch(
    family: tuple[Any, Path], generator: Generator
) -> None:
    wanted = by_transformers(family[0], generator, PROMPTS, 16)
    assert len({tuple(tokens) for tokens in wanted}) == 3
    assert max(len(set(tokens)) for tokens in wanted) > 4
    batch = generator.generate(PROMPTS, max_new_tokens=16)
    assert [list(entry.tokens) for entry in batch.continuations] == wanted
    for prompt, tokens in zip(PROMPTS, wanted, strict=True):
        alone = generator.generate([prompt], max_new_tokens=16)
        assert list(alone.continuations[0].tokens) == tokens


def test_the_counts_and_times_are_of_the_batch(generator: Generator) -> None:
    written = generator.generate(PROMPTS, max_new_tokens=5)
    assert written.prompt_tokens == sum(map(len, PROMPTS))
    assert (written.new_tokens, written.decode_steps) == (15, 4)
    assert written.tokens_per_second == pytest.approx(12 / written.decode_seconds)
    assert written.prefill_seconds > 0
    assert [entry.prompt for entry in written.continuations] == PROMPTS
    assert {entry.stopped for entry in written.continuations} == {"length"}
    assert generator.generate(["a"], max_new_tokens=1).tokens_per_second == 0


def test_the_end_of_text_stops_one_row_and_not_the_others(generator: Generator) -> None:
    whole = generator.generate(PROMPTS, max_new_tokens=12).continuations
    first = whole[0].tokens
    # a token that the first row brings and the others do not: made the end of text, it stops that row alone
    ends = next(token for token in first[1:] if all(token not in entry.tokens for entry in whole[1:]))
    generator.ends = frozenset({ends})
    found = generator.generate(PROMPTS, max_new_tokens=12).continuations
    assert [entry.stopped for entry in found] == ["end", "length", "length"]
    assert found[0].tokens == first[: first.index(ends) + 1]
    assert [entry.tokens for entry in found[1:]] == [entry.tokens for entry in whole[1:]]
    alone = generator.generate(PROMPTS[:1], max_new_tokens=12)
    assert alone.new_tokens == len(found[0].tokens)


def test_text_comes_in_pieces_that_make_the_whole(generator: Generator) -> None:
    pieces: list[tuple[int, str]] = []
    written = generator.generate(PROMPTS, max_new_tokens=12, show=lambda index, piece: pieces.append((index, piece)))
    for index, entry in enumerate(written.continuations):
        assert "".join(piece for row, piece in pieces if row == index) == entry.text
        assert entry.text == generator.tokenizer.decode(list(entry.tokens), skip_special_tokens=True)
    assert len(pieces) > len(PROMPTS)


@pytest.mark.parametrize("count", [1, 7])
def test_steps_behind_the_cache_give_the_logits_of_one_pass(family: tuple[Any, Path], count: int) -> None:
    session = CachedSession(family[1] / "model.onnx")
    ids = np.random.default_rng(2).integers(0, END, (2, 28))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    whole, _ = session.step(ids, mask, session.hold(session.decoder.empty_cache(2)))
    cache = session.hold(session.decoder.empty_cache(2))
    for start in range(0, 28, count):
        logits, cache = session.step(ids[:, start : start + count], mask[:, : start + count], cache)
        for row, first in ((0, 3), (1, 0)):
            seen = max(first - start, 0)
            np.testing.assert_allclose(logits[row, seen:], whole[row, start + seen : start + count], atol=1e-4)


def test_a_step_does_not_change_the_cache_it_came_from(family: tuple[Any, Path]) -> None:
    session = CachedSession(family[1] / "model.onnx")
    _, cache = session.step(np.array([[1, 2, 3]]), None, session.hold(session.decoder.empty_cache()))
    first, _ = session.step(np.array([[4]]), None, cache)
    other, _ = session.step(np.array([[9]]), None, cache)
    again, _ = session.step(np.array([[4]]), None, cache)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_a_cache_of_another_batch_is_refused(family: tuple[Any, Path]) -> None:
    session = CachedSession(family[1] / "model.onnx")
    with pytest.raises(
        SourceError, match=r"the cache: input\..* has shape \[1, \d, 0, 8\], not \[2, \d, positions, 8\]"
    ):
        session.step(np.array([[1], [2]]), None, session.hold(session.decoder.empty_cache(1)))


def test_tokens_of_another_vocabulary_are_refused(family: tuple[Any, Path]) -> None:
    session = CachedSession(family[1] / "model.onnx")
    with pytest.raises(SourceError, match=r"onnxruntime cannot run these tokens .*; check that the tokenizer is"):
        session.step(np.array([[END + 7]]), None, session.hold(session.decoder.empty_cache()))


def test_generation_ends_with_the_position_table(generator: Generator) -> None:
    prompt = "x" * (POSITIONS - 3)
    (found,) = generator.generate([prompt], max_new_tokens=20).continuations
    assert (len(found.tokens), found.stopped) == (4, "positions")
    (whole,) = generator.generate([prompt], max_new_tokens=4).continuations
    assert (whole.tokens, whole.stopped) == (found.tokens, "length")
    with pytest.raises(SourceError, match=f"it is {POSITIONS + 1} tokens long and the model's position table holds 48"):
        generator.generate(["x" * (POSITIONS + 1)])


def test_an_empty_prompt_is_refused(generator: Generator) -> None:
    for prompts in ([], [""], ["a", ""]):
        with pytest.raises(SourceError, match="the prompt: there are no tokens in it; give some text"):
            generator.generate(prompts)


def test_the_seed_decides_what_is_drawn(generator: Generator) -> None:
    def text(seed: int) -> tuple[int, ...]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return generator.generate(["the"], max_new_tokens=12, sampling=sampling).continuations[0].tokens

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_most_likely_of_one_token_is_the_greedy_text(generator: Generator) -> None:
    greedy = generator.generate(PROMPTS, max_new_tokens=8).continuations
    drawn = generator.generate(PROMPTS, max_new_tokens=8, sampling=Sampling(temperature=2.0, top_k=1)).continuations
    assert drawn == greedy


def test_draws_follow_the_temperature() -> None:
    logits = np.log(np.array([[0.8, 0.1, 0.1]], dtype=np.float32)).repeat(20000, axis=0)
    seen = np.zeros((20000, 1), dtype=np.int64)
    for temperature in (1.0, 2.0):
        odds = np.array([0.8, 0.1, 0.1]) ** (1 / temperature)
        counts = np.bincount(chooser(Sampling(temperature=temperature))(seen, logits), minlength=3)
        np.testing.assert_allclose(counts / 20000, odds / odds.sum(), atol=0.02)


@pytest.mark.parametrize(
    ("options", "allowed"), [({"top_k": 2}, {0, 1}), ({"top_p": 0.75}, {0, 1}), ({"top_p": 0.4}, {0})]
)
def test_draws_are_from_the_likeliest_alone(options: dict[str, Any], allowed: set[int]) -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], dtype=np.float32)).repeat(500, axis=0)
    chosen = chooser(Sampling(temperature=1.0, **options))(np.zeros((500, 1), dtype=np.int64), logits)
    assert set(chosen.tolist()) == allowed


def test_processors_of_transformers_take_part_without_sampling_too() -> None:
    from transformers import SuppressTokensLogitsProcessor

    logits = np.array([[3.0, 2.0, 1.0]], dtype=np.float32)
    choose = chooser(Sampling(processors=[SuppressTokensLogitsProcessor([0])]))
    assert choose(np.zeros((1, 1), dtype=np.int64), logits).tolist() == [1]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-1), "--temperature: it must be 0 or more"),
        (Sampling(temperature=float("nan")), "--temperature: it must be 0 or more"),
        (Sampling(temperature=1, top_k=0), "--top-k: it must be at least 1"),
        (Sampling(temperature=1, top_p=0), "--top-p: it must be above 0 and at most 1"),
        (Sampling(temperature=1, top_p=1.5), "--top-p: it must be above 0 and at most 1"),
        (Sampling(top_k=5), "--top-k and --top-p: they have no part in .*; give --temperature too"),
    ],
)
def test_options_out_of_range_are_one_error(sampling: Sampling, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        chooser(sampling)


def test_sampling_without_transformers_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    chooser(Sampling())
    with pytest.raises(
        SourceError, match=r"sampling needs the package torch; pip install 'scalefold\[hf\]', or take the"
    ):
        chooser(Sampling(temperature=1))


def test_at_least_one_token_is_asked_for(generator: Generator) -> None:
    with pytest.raises(SourceError, match="--max-new-tokens: it must be at least 1"):
        generator.generate(["a"], max_new_tokens=0)


def test_an_encoder_cannot_generate(float_model: Path) -> None:
    with pytest.raises(SourceError, match=r"model.onnx: it is not a decoder: .*; export a causal language model"):
        Generator(float_model)


@pytest.mark.parametrize("missing", ["model.onnx", "tokenizer.json"])
def test_a_folder_without_model_or_tokenizer_is_refused(tmp_path: Path, missing: str) -> None:
    for name in {"model.onnx", "tokenizer.json"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match=f"there is no {missing} in it; give a compiled folder"):
        Generator(tmp_path)


def test_the_end_of_text_is_what_the_generation_config_says_first(family: tuple[Any, Path], tmp_path: Path) -> None:
    assert Generator(family[1]).ends == {END}
    for path in family[1].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    assert Generator(tmp_path).ends == {END}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}', encoding="utf-8")
    assert Generator(tmp_path).ends == {3, 4}


def test_the_command_prints_text_on_stdout_and_its_speed_on_stderr(
    family: tuple[Any, Path], generator: Generator, cli: Cli
) -> None:
    (wanted,) = generator.generate(["the value"], max_new_tokens=8).continuations
    done = cli("generate", family[1], "--prompt", "the value", "--max-new-tokens", "8")
    assert (done.returncode, done.stdout) == (0, wanted.text + "\n")
    assert re.search(r"8 tokens after 9 of the prompt, stopped by length; .*\d tokens/s", done.stderr)
    done = cli("generate", family[1], "--prompt", "the value", "--max-new-tokens", "8", "--json")
    facts = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert facts["continuations"][0]["tokens"] == list(wanted.tokens)
    assert facts["tokens_per_second"] > 0
    done = cli("generate", family[1], "--prompt", "a", "--top-k", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error --top-k and --top-p: ")
