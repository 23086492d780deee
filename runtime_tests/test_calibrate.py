from __future__ import annotations

import gc
import json
import tempfile
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from scalefold.compiler.calibrate import (
    DEFAULT_ORIGIN,
    Calibration,
    RunningText,
    TextEncoder,
    calibration_from,
    collect,
    default_texts,
    padding_mask,
    rows_of,
)
from scalefold.compiler.errors import CalibrationError
from scalefold.compiler.runtime import Array, Feed
from scalefold.compiler.schemes import Float
from scalefold.compiler.stats import ChannelRange, TokenRange
from scalefold.compiler.testing import parse

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "home"]
TEXTS = ["the quick brown fox jumps", "over a lazy dog and runs home", "the dog jumps over the fox"]
OF_NUMBERS = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 2] x, int64[b, s] attention_mask) => (float[b, s, 2] y, float[b] total)
<float[2] c = {1.0, -1.0}, int64[1] length = {1}>
{ h = Mul(x, c)  y = Neg(h)  m = Cast<to = 1>(attention_mask)  total = ReduceSum<keepdims = 0>(m, length) }
"""
OF_TEXT = """<ir_version: 10, opset_import: ["" : 20]>
model (int64[b, s] input_ids, int64[b, s] attention_mask%s) => (float[b, s, 2] y)
<float[16, 2] table = {%s}> { y = Gather(table, input_ids) }
"""
TABLE = ", ".join(f"{number}.0" for number in range(32))


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary files go under the test's own folder."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def numbers() -> ir.Model:
    return parse(OF_NUMBERS)


@pytest.fixture
def texts() -> ir.Model:
    return parse(OF_TEXT % ("", TABLE))


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def feed(number: int, tokens: int = 3) -> Feed:
    generator = np.random.default_rng(number)
    return {
        "x": generator.standard_normal((1, tokens, 2)).astype(np.float32),
        "attention_mask": np.ones((1, tokens), np.int64),
    }


def opened(
    source: object,
    model: ir.Model,
    tokenizer_file: Path | None = None,
    *,
    samples: int = 100,
    max_length: int = 16,
) -> Calibration:
    return calibration_from(source, model, tokenizer_file=tokenizer_file, samples=samples, max_length=max_length)


def assert_same_feeds(got: Calibration, wanted: list[Feed]) -> None:
    """Equal, and again on a second reading."""
    assert got.count == len(wanted)
    for _ in range(2):
        for left, right in zip(got.feeds(), wanted, strict=True):
            assert sorted(left) == sorted(right)
            for name in right:
                assert left[name].dtype == right[name].dtype
                np.testing.assert_array_equal(left[name], right[name])


class Reader:
    """onnxruntime's data reader in its smallest form."""

    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds = list(feeds)
        self._next = iter(self._feeds)

    def get_next(self) -> Mapping[str, Array] | None:
        return next(self._next, None)


class RewindingReader(Reader):
    def rewind(self) -> None:
        self._next = iter(self._feeds)


# ---- sources


def test_lines_of_text_become_feeds_of_tokens(texts: ir.Model, tokenizer_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text(f"{TEXTS[0]}\n\n  {TEXTS[1]}  \ntoo short\n{TEXTS[2]}\n", encoding="utf-8")
    calibration = opened(path, texts, tokenizer_file)
    assert_same_feeds(calibration, [TextEncoder(tokenizer_file, texts, 16)(text) for text in TEXTS])
    assert calibration.origin == str(path)


def test_a_list_of_texts_becomes_feeds_of_tokens(texts: ir.Model, tokenizer_file: Path) -> None:
    calibration = opened(TEXTS, texts, tokenizer_file)
    first = next(calibration.feeds())
    assert first["input_ids"].tolist() == [[2, 4, 5, 6, 7, 8, 3]]
    assert first["attention_mask"].tolist() == [[1] * 7]
    assert_same_feeds(calibration, [TextEncoder(tokenizer_file, texts, 16)(text) for text in TEXTS])


def test_a_generator_of_texts_becomes_feeds_of_tokens(texts: ir.Model, tokenizer_file: Path) -> None:
    calibration = opened((text for text in TEXTS), texts, tokenizer_file)
    assert_same_feeds(calibration, [TextEncoder(tokenizer_file, texts, 16)(text) for text in TEXTS])


def test_texts_are_taken_evenly_spaced(texts: ir.Model, tokenizer_file: Path) -> None:
    many = [f"{word} {word} {word} {word}" for word in WORDS[:9]]
    calibration = opened(many, texts, tokenizer_file, samples=3)
    assert [int(entry["input_ids"][0, 1]) for entry in calibration.feeds()] == [4, 8, 12]


def test_text_is_cut_to_the_length_with_its_special_tokens(texts: ir.Model, tokenizer_file: Path) -> None:
    (entry,) = opened([" ".join(WORDS)], texts, tokenizer_file, max_length=5).feeds()
    assert entry["input_ids"].tolist() == [[2, 4, 5, 6, 3]]


def test_a_tokenizer_that_pads_does_not_pad_here(texts: ir.Model, tokenizer_file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tokenizer_file))
    (entry,) = opened(TEXTS[:1], texts, tokenizer_file).feeds()
    assert entry["input_ids"].shape == (1, 7)


def test_every_kind_of_token_input_is_filled(tokenizer_file: Path) -> None:
    model = parse(OF_TEXT % (", int64[b, s] token_type_ids, int64[b, s] position_ids", TABLE))
    (entry,) = opened(TEXTS[:1], model, tokenizer_file).feeds()
    assert entry["token_type_ids"].tolist() == [[0] * 7]
    assert entry["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert all(array.dtype == np.int64 for array in entry.values())


def test_json_lines_with_text_become_feeds_of_tokens(texts: ir.Model, tokenizer_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": 1}) for text in TEXTS) + "\n\n", encoding="utf-8")
    assert_same_feeds(
        opened(str(path), texts, tokenizer_file), [TextEncoder(tokenizer_file, texts, 16)(text) for text in TEXTS]
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_json_lines_with_feeds_get_the_types_and_the_batch_of_the_model(
    numbers: ir.Model, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"feeds{suffix}"
    lines = [
        {"x": [[1, 2], [3, 4]], "attention_mask": [1, 0]},
        {"x": [[[0.5, 2.5]]], "attention_mask": [[1]]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    wanted: list[Feed] = [
        {"x": np.array([[[1, 2], [3, 4]]], np.float32), "attention_mask": np.array([[1, 0]])},
        {"x": np.array([[[0.5, 2.5]]], np.float32), "attention_mask": np.array([[1]])},
    ]
    assert_same_feeds(opened(path, numbers), wanted)


def test_an_archive_of_arrays_becomes_batches(numbers: ir.Model, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((19, 4, 2)).astype(np.float32)
    mask = np.ones((19, 4), np.int64)
    np.savez(tmp_path / "feeds.npz", x=x, attention_mask=mask)
    wanted: list[Feed] = [
        {"x": x[start : start + 8], "attention_mask": mask[start : start + 8]} for start in (0, 8, 16)
    ]
    assert_same_feeds(opened(tmp_path / "feeds.npz", numbers), wanted)


def test_an_archive_for_a_model_of_fixed_batch_is_cut_to_that_batch(tmp_path: Path) -> None:
    model = parse(OF_NUMBERS.replace("[b, s", "[1, s").replace("float[b]", "float[1]"))
    np.savez(tmp_path / "feeds.npz", x=np.ones((3, 4, 2), np.float32), attention_mask=np.ones((3, 4), np.int64))
    calibration = opened(tmp_path / "feeds.npz", model)
    gathered = collect(model, {"h": ChannelRange}, calibration.feeds())
    assert calibration.count == 3
    assert isinstance(gathered["h"], ChannelRange)


@pytest.mark.parametrize("kind", [Reader, RewindingReader])
def test_a_data_reader_is_read_once_and_can_then_be_read_again(numbers: ir.Model, kind: type[Reader]) -> None:
    feeds = [feed(number) for number in range(5)]
    calibration = opened(kind(feeds), numbers)
    assert_same_feeds(calibration, feeds)
    assert calibration.origin == f"data reader {kind.__name__}"


def test_a_generator_is_read_only_as_far_as_samples_are_wanted(numbers: ir.Model) -> None:
    taken: list[int] = []

    def endless() -> Iterator[Feed]:
        while True:
            taken.append(len(taken))
            yield feed(taken[-1])

    assert_same_feeds(opened(endless(), numbers, samples=4), [feed(number) for number in range(4)])
    assert len(taken) <= 5


def test_a_list_of_feeds_with_other_lengths_is_kept_as_it_is(numbers: ir.Model) -> None:
    feeds = [feed(number, tokens=number + 1) for number in range(4)]
    assert_same_feeds(opened(feeds, numbers), feeds)


def test_numbers_of_another_width_become_those_of_the_model(numbers: ir.Model) -> None:
    wide = {"x": np.ones((1, 2, 2), np.float64), "attention_mask": np.ones((1, 2), np.int32)}
    assert_same_feeds(
        opened([wide], numbers), [{"x": np.ones((1, 2, 2), np.float32), "attention_mask": np.ones((1, 2), np.int64)}]
    )


def test_without_a_source_the_text_of_the_python_installation_is_taken(texts: ir.Model, tokenizer_file: Path) -> None:
    calibration = opened(None, texts, tokenizer_file, samples=7)
    assert (calibration.count, calibration.origin) == (7, DEFAULT_ORIGIN)
    assert len(list(calibration.feeds())) == 7


def test_the_default_text_is_plentiful_prose_without_repeats_in_a_fixed_order() -> None:
    first = default_texts()
    assert len(first) > 1000
    assert len(first) == len(set(first))
    assert first == default_texts()
    assert all(len(text) >= 30 and text[0].isupper() and "\n" not in text for text in first)


# ---- errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.npz", None, "no such file"),
        ("absent.txt", None, "no such file"),
        ("feeds.jsonl", "{not json}", "cannot be read"),
        ("feeds.jsonl", "[1, 2]\n", "every line must be an object"),
        ("feeds.jsonl", '{"x": [[1, "a"]], "attention_mask": [1]}', "cannot be read"),
        ("feeds.jsonl", '{"x": [[1, 2]], "attention_mask": [1], "extra": [1]}', "does not take extra"),
        ("feeds.jsonl", '{"x": [[1, 2]]}', "lacks attention_mask"),
        ("feeds.jsonl", '{"x": [[NaN, 2]], "attention_mask": [1]}', "x holds NaN or infinity"),
        ("feeds.jsonl", '{"x": [[1, -Infinity]], "attention_mask": [1]}', "x holds NaN or infinity"),
        ("feeds.jsonl", "", "holds no samples"),
        ("lines.txt", b"\xff\xfe\x00caf\xe9 au lait", "cannot be read"),
        ("feeds.npz", b"", "cannot be read"),
        ("feeds.npz", b"no archive at all", "cannot be read"),
        ("feeds.npz", b"PK\x03\x04 cut short", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(
    numbers: ir.Model, tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CalibrationError, match=message) as caught:
        opened(path, numbers)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lines.txt", "lines.jsonl"])
def test_a_text_file_without_text_holds_no_samples(
    texts: ir.Model, tokenizer_file: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match="holds no samples"):
        opened(tmp_path / name, texts, tokenizer_file)


def test_an_archive_of_arrays_of_other_lengths_is_an_error(numbers: ir.Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz", x=np.ones((3, 2, 2), np.float32), attention_mask=np.ones((4, 2), np.int64))
    with pytest.raises(CalibrationError, match="different numbers of samples"):
        opened(tmp_path / "feeds.npz", numbers)


def test_one_array_that_is_called_an_archive_is_an_error(numbers: ir.Model, tmp_path: Path) -> None:
    with (tmp_path / "feeds.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(CalibrationError, match="cannot be read"):
        opened(tmp_path / "feeds.npz", numbers)


def test_an_archive_without_arrays_holds_no_samples(numbers: ir.Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz")
    with pytest.raises(CalibrationError, match="holds no samples"):
        opened(tmp_path / "feeds.npz", numbers)


@pytest.mark.parametrize("source", [[], iter(()), Reader([])], ids=["list", "iterator", "reader"])
def test_a_source_that_gives_nothing_holds_no_samples(numbers: ir.Model, source: object) -> None:
    with pytest.raises(CalibrationError, match="holds no samples"):
        opened(source, numbers)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": np.ones(1)}, "sample 1 of feeds: the model does not take y; it takes x, attention_mask"),
        ({"x": np.full((1, 3, 2), np.nan, np.float32)}, "sample 1 of feeds: x holds NaN or infinity"),
        ({"x": np.full((1, 3, 2), np.inf, np.float32)}, "sample 1 of feeds: x holds NaN or infinity"),
        ({"attention_mask": np.full((1, 3), 0.5)}, "sample 1 of feeds: attention_mask"),
        ({"x": np.ones((3, 2), np.float32)}, "sample 1 of feeds: x"),
        ({"x": np.ones((1, 3, 5), np.float32)}, "sample 1 of feeds: x"),
        ({"x": [[1, 2], [3]]}, "sample 1 of feeds: x is not an array .*; give rows of one length"),
    ],
    ids=["unknown input", "NaN", "infinity", "another kind", "another rank", "another size", "rows of many lengths"],
)
def test_a_feed_that_does_not_fit_the_model_says_which_and_why(
    numbers: ir.Model, changed: dict[str, Array], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        opened([feed(0), {**feed(1), **changed}], numbers)


def test_a_feed_that_lacks_an_input_says_which(numbers: ir.Model) -> None:
    with pytest.raises(CalibrationError, match="it lacks attention_mask; the model takes x, attention_mask"):
        opened([{"x": feed(0)["x"]}], numbers)


@pytest.mark.parametrize("source", [[np.ones(3)], {"x": np.ones(3)}, [feed(0), "text"]], ids=["array", "dict", "mixed"])
def test_what_is_no_feed_is_an_error(numbers: ir.Model, source: object) -> None:
    with pytest.raises(CalibrationError, match="not a mapping of input names to arrays"):
        opened(source, numbers)


def test_what_is_no_source_is_an_error(numbers: ir.Model) -> None:
    with pytest.raises(CalibrationError, match="a int is not calibration data"):
        opened(7, numbers)


@pytest.mark.parametrize("source", [None, TEXTS])
def test_text_without_a_tokenizer_is_an_error(texts: ir.Model, source: object) -> None:
    with pytest.raises(CalibrationError, match="no tokenizer"):
        opened(source, texts)


def test_text_for_a_model_that_takes_other_inputs_is_an_error(numbers: ir.Model, tokenizer_file: Path) -> None:
    with pytest.raises(CalibrationError, match="text cannot fill the model's inputs x"):
        opened(TEXTS, numbers, tokenizer_file)


def test_an_activation_that_becomes_nan_is_an_error_that_names_it_and_the_sample() -> None:
    model = parse("""<ir_version: 10, opset_import: ["" : 20]>
    model (float[b, 2] x) => (float[b, 2] y) { root = Sqrt(x)  y = Neg(root) }""")
    feeds: list[Feed] = [{"x": np.ones((1, 2), np.float32)}, {"x": -np.ones((1, 2), np.float32)}]
    with pytest.raises(CalibrationError, match="sample 1: the activation root becomes NaN or infinite"):
        collect(model, {"root": ChannelRange}, feeds)


# ---- reading again, splitting, choosing


def numbered(count: int) -> Calibration:
    return Calibration(lambda: ({"x": np.array([number])} for number in range(count)), count, "numbers")


def numbers_of(calibration: Calibration) -> list[int]:
    return [int(entry["x"][0]) for entry in calibration.feeds()]


@pytest.mark.parametrize(("count", "held"), [(144, 16), (48, 16), (100, 7), (3, 1), (50, 1)])
def test_a_split_is_even_disjoint_and_whole(count: int, held: int) -> None:
    used, apart = numbered(count).split(held, 128)
    assert (used.count, apart.count) == (count - held, held)
    assert len(numbers_of(apart)) == held
    assert sorted(numbers_of(used) + numbers_of(apart)) == list(range(count))
    gaps = np.diff(numbers_of(apart))
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert numbers_of(apart) == numbers_of(apart)


def test_samples_that_an_even_split_cannot_part_are_not_split() -> None:
    whole = numbered(17)
    assert whole.split(16, 1) == (whole, whole)


def test_windows_of_text_without_line_feeds_begin_at_words(
    decoder_models: dict[str, ir.Model], tokenizer_file: Path
) -> None:
    text = "the value of an object is not a list " * 200
    found = RunningText(tokenizer_file, decoder_models["gpt2"], 16, text).windows(6)
    assert len(found) == 6


def test_a_single_number_is_one_row() -> None:
    assert rows_of(np.array(3, np.float32), None).tolist() == [[3.0]]


@pytest.mark.parametrize("count", [1, 16, 47])
def test_too_few_samples_are_not_split(count: int) -> None:
    whole = numbered(count)
    used, apart = whole.split(16, 128)
    assert used is whole
    assert apart is whole


@pytest.mark.parametrize(("count", "wanted", "chosen"), [(9, 3, [0, 4, 8]), (3, 5, [0, 1, 2]), (10, 1, [0])])
def test_the_head_is_evenly_spaced_over_the_set(count: int, wanted: int, chosen: list[int]) -> None:
    assert [int(entry["x"][0]) for entry in numbered(count).head(wanted)] == chosen


def test_the_digest_depends_on_every_name_type_shape_and_byte() -> None:
    def digest(*feeds: Feed) -> str:
        return Calibration(lambda: iter(feeds), len(feeds), "digest").digest()

    x = np.arange(6, dtype=np.int64)
    base = digest({"x": x}, {"x": x})
    assert base == digest({"x": x.copy()}, {"x": x.copy()})
    others = [
        digest({"x": x}),
        digest({"y": x}, {"x": x}),
        digest({"x": x.reshape(2, 3)}, {"x": x}),
        digest({"x": x.astype(np.int32)}, {"x": x}),
        digest({"x": x + 1}, {"x": x}),
    ]
    assert len({base, *others}) == 6
    assert digest({"x": x, "y": x}) == digest({"y": x, "x": x})
    assert digest({"x": np.arange(6).reshape(2, 3).T}) == digest({"x": np.arange(6).reshape(2, 3).T.copy()})


# ---- statistics


def test_rows_leave_padding_out_where_the_mask_fits() -> None:
    activation = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    assert rows_of(activation, mask).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert rows_of(activation, None).shape == (6, 2)
    assert rows_of(activation[:, 0], mask).shape == (2, 2)
    assert rows_of(activation.reshape(1, 2, 3, 2), mask).shape == (6, 2)


def test_only_a_mask_over_tokens_is_a_padding_mask() -> None:
    mask = np.ones((1, 3), np.int64)
    assert padding_mask({"attention_mask": mask}) is mask
    assert padding_mask({"attention_mask": np.ones((1, 1, 3, 3))}) is None
    assert padding_mask({"x": mask}) is None


def test_padding_is_left_out_of_statistics(numbers: ir.Model) -> None:
    x = np.array([[[1, 2], [3, 4], [900, -900]]], np.float32)
    gathered = collect(
        numbers,
        {"h": TokenRange, "y": ChannelRange},
        [{"x": x, "attention_mask": np.array([[1, 1, 0]])}, {"x": -x[:, :2], "attention_mask": np.ones((1, 2), int)}],
    )
    tokens, channels = gathered["h"], gathered["y"]
    assert isinstance(tokens, TokenRange)
    assert isinstance(channels, ChannelRange)
    assert (tokens.low, tokens.high, tokens.count) == (-4.0, 4.0, 4)
    assert channels.low is not None
    assert channels.low.tolist() == [-3, -4]


def test_each_sample_keeps_its_number_and_is_counted(numbers: ir.Model) -> None:
    seen: list[tuple[int, int]] = []

    class Recorder:
        def update(self, rows: Float, sample: int) -> None:
            seen.append((sample, len(rows)))

        def merge(self, other: Recorder) -> Recorder:
            return self

    steps: list[None] = []
    collect(numbers, {"h": Recorder}, [feed(0, 2), feed(1, 4)], lambda: steps.append(None))
    assert seen == [(0, 2), (1, 4)]
    assert len(steps) == 2


# ---- memory


def big(count: int, living: list[int]) -> Iterator[Feed]:
    """Feeds of 512 kB, and how many of them were alive at once."""
    alive: set[int] = set()
    for number in range(count):
        x = np.full((1, 65536, 2), number, np.float32)
        alive.add(number)
        weakref.finalize(x, alive.discard, number)
        living.append(len(alive))
        yield {"x": x, "attention_mask": np.ones((1, 65536), np.int64)}
        del x


def peak_of(work: Callable[[], object]) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_memory_of_calibration_does_not_grow_with_the_number_of_samples(numbers: ir.Model) -> None:
    living: list[int] = []

    def calibrate(count: int) -> None:
        calibration = opened(big(count, living), numbers, samples=count)
        assert calibration.count == count
        collect(numbers, {"h": ChannelRange}, calibration.feeds())

    calibrate(2)  # whatever is made once is made here
    few = peak_of(lambda: calibrate(8))
    assert peak_of(lambda: calibrate(40)) < 1.2 * few
    assert max(living) <= 3


def test_the_memory_of_bounded_statistics_does_not_grow_with_the_number_of_samples(numbers: ir.Model) -> None:
    def gather(count: int) -> None:
        collect(numbers, {"h": lambda: TokenRange(capacity=1000)}, (feed(number, 500) for number in range(count)))

    gather(2)
    assert peak_of(lambda: gather(200)) < 1.2 * peak_of(lambda: gather(20))


def test_feeds_kept_on_disk_go_with_the_calibration(numbers: ir.Model, scratch: Path) -> None:
    calibration = opened((feed(number) for number in range(3)), numbers)
    assert len(list(scratch.rglob("*.npz"))) == 3
    del calibration
    gc.collect()
    assert not list(scratch.iterdir())
