from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from scalefold import passes
from scalefold.compiler.errors import RecipeError
from scalefold.compiler.protocol import Pipeline
from scalefold.compiler.recipe import Recipe, WeightFormat, load_recipe, named_recipes, recipe_text
from scalefold.passes import pipeline
from scalefold.passes.insert_qdq import InsertQdq
from scalefold.passes.learn_scales import LearnScales
from scalefold.passes.pack_weights import PackWeights


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, so that no name is taken for a file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(named_recipes()))
def test_every_named_recipe_loads_and_has_passes(name: str, folder: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    assert isinstance(passes.pipeline(recipe), Pipeline)


def test_the_named_recipes_are_those_the_documentation_speaks_of() -> None:
    assert {"w8a8", "w8a8-naive", "w8a8-token", "w6a6"} <= set(named_recipes())


@pytest.mark.parametrize("name", sorted(named_recipes()))
def test_a_recipe_written_out_is_read_back_the_same(name: str, folder: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(written(folder, yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe
    path = written(folder, recipe_text(recipe))
    assert load_recipe(path) == recipe
    assert load_recipe(str(path)) == recipe
    assert load_recipe(recipe) is recipe


def test_choices_of_single_layers_come_back_with_their_order(folder: Path) -> None:
    content = {
        "weights": {
            "bits": 4,
            "group_size": 32,
            "layers": {"^b$": {"bits": 8, "group_size": None}, "^a\\.0$": {"format": "kmeans", "codebook": "column"}},
        },
        "activations": {"per_token": ["^b$", "^a\\.0$"]},
    }
    recipe = Recipe.model_validate({"name": "mixed", **content})
    found = load_recipe(written(folder, recipe_text(recipe)))
    assert found == recipe
    assert list(found.weights.layers) == ["^b$", "^a\\.0$"]
    assert found.weights.of("b") == WeightFormat()
    assert found.weights.of("a.0") == WeightFormat(format="kmeans", bits=4, codebook="column")
    assert recipe_text(found) == recipe_text(recipe)


def test_what_a_file_leaves_out_has_its_default_and_the_name_is_that_of_the_file(folder: Path) -> None:
    recipe = load_recipe(written(folder, "weights: {bits: 4}\n"))
    assert recipe == Recipe.model_validate({"name": "mine", "weights": {"bits": 4}})
    assert recipe.migration is None
    assert recipe.activations is not None and recipe.activations.bits == 8


def test_a_section_that_is_null_is_not_done(folder: Path) -> None:
    recipe = load_recipe(written(folder, "migration: null\nembeddings: null\n"))
    assert recipe.migration is None
    assert recipe.embeddings is None


def test_an_empty_section_takes_its_defaults(folder: Path) -> None:
    recipe = load_recipe(written(folder, "migration: {}\n"))
    assert recipe.migration is not None
    assert recipe.migration.shift


def test_activations_are_per_tensor_unless_a_recipe_says_otherwise(folder: Path) -> None:
    assert InsertQdq(8, "per-tensor", ()) in passes.pipeline(Recipe()).quantize
    recipe = load_recipe(written(folder, "activations: {bits: 6, granularity: per-token}\n"))
    assert InsertQdq(6, "per-token", ()) in passes.pipeline(recipe).quantize
    recipe = load_recipe(written(folder, "activations: {per_token: [down_proj, '^lm_head$']}\n"))
    assert InsertQdq(8, "per-tensor", ("down_proj", "^lm_head$")) in passes.pipeline(recipe).quantize


def test_a_granularity_that_does_not_exist_is_a_fault(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"activations.granularity: input should be 'per-tensor' or 'per-token'"):
        load_recipe(written(folder, "activations: {granularity: per-row}\n"))


def test_every_fault_is_reported_at_once_with_key_and_value(folder: Path) -> None:
    path = written(folder, "weights: {bits: 9}\nactivations: {bits: 1, colour: red}\ntarget: gpu\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert [fault.split(": ")[0] for fault in caught.value.faults] == [
        "weights.bits",
        "activations.bits",
        "activations.colour",
        "target",
    ]
    assert "no such key" in caught.value.faults[2]
    assert caught.value.faults[0].endswith("got 9")
    assert str(caught.value).startswith(f"{path}: 4 faults in the recipe: weights.bits")


def test_three_faults_are_three(folder: Path) -> None:
    with pytest.raises(RecipeError, match="3 faults") as caught:
        load_recipe(written(folder, "calibration: {samples: 0}\nexclude: 7\nwheels: 4\n"))
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("text", ["weights: [", "a: b: c", "\t- x", "&a [*a"])
def test_what_is_not_yaml_is_one_fault_that_says_so_in_one_line(text: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match="not YAML") as caught:
        load_recipe(written(folder, text))
    assert len(caught.value.faults) == 1
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_not_yaml(folder: Path) -> None:
    path = folder / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00weights")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list", "7"])
def test_what_is_no_mapping_is_a_fault(text: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match="not a mapping of keys to values"):
        load_recipe(written(folder, text))


def test_an_unknown_name_lists_the_names(folder: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe of this name") as caught:
        load_recipe("w9a9")
    assert all(name in str(caught.value) for name in named_recipes())


def test_keys_that_are_no_words_are_faults_too(folder: Path) -> None:
    with pytest.raises(RecipeError, match="8: keys should be strings"):
        load_recipe(written(folder, "8: 4\n"))


def test_a_recipe_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(Recipe(), "name", "other")  # noqa: B010


FORMATS = """
weights:
  {format: kmeans, bits: 4, codebook: column, weighting: hessian, compensation: true,
   layers: {pooler: {bits: 8}, 'attention': {format: linear, group_size: 32}, query: {format: linear, solver: rtn}}}
"""


def test_the_last_pattern_that_matches_a_layer_says_its_format(folder: Path) -> None:
    weights = load_recipe(written(folder, FORMATS)).weights
    assert weights.of("pooler.dense") == WeightFormat(
        format="kmeans", bits=8, codebook="column", weighting="hessian", compensation=True
    )
    assert weights.of("attention.key") == WeightFormat(bits=4, group_size=32)
    assert weights.of("attention.query") == WeightFormat(bits=4, solver="rtn")
    assert str(weights.of("attention.key")) == "int4 in groups of 32"
    assert str(weights.of("output")) == "4-bit kmeans per column"


def test_overrides_are_written_out_and_read_back_as_they_were_given(folder: Path) -> None:
    recipe = load_recipe(written(folder, FORMATS))
    content = recipe.model_dump(mode="json")
    assert content["weights"]["layers"]["query"] == {"format": "linear", "solver": "rtn"}
    assert load_recipe(written(folder, yaml.safe_dump(content))) == recipe


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{bits: 0}", "weights.bits: input should be greater than or equal to 1, got 0"),
        ("{format: kmeans, solver: hqq}", "weights: solver hqq is not one of format kmeans, which has lloyd, exact"),
        ("{format: kmeans, group_size: 8}", "weights: group_size is for linear and bcq"),
        ("{weighting: hessian}", "weights: weighting is for kmeans"),
        ("{bits: 7, group_size: 32}", "weights: int8 has no room for a step per group of 7-bit codes"),
        ("{format: kmeans, bits: 7, solver: exact}", "weights: solver exact takes too long above 6 bits"),
        ("{bits: 4, solver: hqq}", "weights: solver hqq moves the zero point"),
        ("{layers: {fc: {bits: 9}}}", "weights.layers.fc.bits: input should be less than or equal to 8, got 9"),
        ("{layers: {fc: {solver: lloyd}}}", "weights: layers.fc: solver lloyd is not one of format linear"),
        ("{layers: {fc: {colour: red}}}", "weights.layers.fc.colour: no such key"),
    ],
)
def test_values_that_do_not_go_together_are_faults_that_say_why(text: str, fault: str, folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(folder, f"weights: {text}\n"))
    assert caught.value.faults[0].startswith(fault)
    assert "\n" not in str(caught.value)


def test_tables_of_embeddings_have_formats_too(folder: Path) -> None:
    recipe = load_recipe(written(folder, "embeddings: {bits: 4, group_size: 32}\n"))
    assert recipe.embeddings is not None
    assert recipe.embeddings.weight == WeightFormat(bits=4, group_size=32)
    with pytest.raises(RecipeError, match="embeddings: group_size is for linear and bcq"):
        load_recipe(written(folder, "embeddings: {bits: 4, format: kmeans, group_size: 32}\n"))


def test_float_activations_leave_nothing_to_tame(folder: Path) -> None:
    recipe = load_recipe(written(folder, "activations: null\n"))
    quantize = [entry.name for entry in passes.pipeline(recipe).quantize]
    assert quantize == ["quantize-weights"]
    assert "lower-integer-matmul" not in [entry.name for entry in passes.pipeline(recipe).lower]
    with pytest.raises(RecipeError, match="prefix, migration would do nothing, because activations are null"):
        load_recipe(written(folder, "activations: null\nprefix: {}\nmigration: {}\n"))


def test_weights_are_packed_unless_a_recipe_says_otherwise(folder: Path) -> None:
    assert passes.pipeline(Recipe()).lower[-1] == PackWeights()
    recipe = load_recipe(written(folder, "weights: {bits: 6, packed: false}\n"))
    assert PackWeights() not in passes.pipeline(recipe).lower


def test_solvers_default_to_the_best_of_their_format() -> None:
    assert [WeightFormat(bits=bits).chosen_solver for bits in (8, 4)] == ["rtn", "mse"]
    assert WeightFormat(format="kmeans", bits=4).chosen_solver == "lloyd"
    assert WeightFormat(format="bcq", bits=4).chosen_solver == "alternating"


def test_learning_needs_static_ranges() -> None:
    with pytest.raises(ValidationError, match="scales are learned for static ranges"):
        Recipe.model_validate({"learning": {}, "activations": {"granularity": "per-token"}})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("exceptions: {}", "exceptions are judged where ranges are fitted: give activations.clipping more than 0"),
        ("learning: {ranges: true, end_to_end_steps: 0}", "learning: ranges are learned end to end"),
        (
            "learning: {ranges: true}\nactivations: {granularity: per-token}",
            "learning.ranges: granularity per-token has no static ranges to learn",
        ),
    ],
)
def test_sections_that_could_do_nothing_are_a_fault(folder: Path, text: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault) as caught:
        load_recipe(written(folder, text))
    assert len(caught.value.faults) == 1


def test_ranges_are_an_option_of_the_pass() -> None:
    assert [LearnScales(ranges=True)] == [
        entry
        for entry in pipeline(Recipe.model_validate({"learning": {"ranges": True}})).transform
        if isinstance(entry, LearnScales)
    ]


def test_learning_is_a_pass_behind_migration() -> None:
    recipe = Recipe.model_validate({"learning": {"steps": 3}, "migration": {}, "exclude": ["head"]})
    migrate, learn, merge = pipeline(recipe).transform
    assert (migrate.name, learn.name, merge.name) == ("migrate-outliers", "learn-scales", "merge-projections")
    assert isinstance(learn, LearnScales) and (learn.steps, learn.exclude) == (3, ("head",))
