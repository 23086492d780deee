from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scalefold import passes
from scalefold.compiler.errors import RecipeError
from scalefold.compiler.protocol import Pipeline
from scalefold.compiler.recipe import Recipe, load_recipe, named_recipes
from scalefold.passes.insert_qdq import InsertQdq


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
    path = written(folder, yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(path) == recipe
    assert load_recipe(str(path)) == recipe
    assert load_recipe(recipe) is recipe


def test_what_a_file_leaves_out_has_its_default_and_the_name_is_that_of_the_file(folder: Path) -> None:
    recipe = load_recipe(written(folder, "weights: {bits: 4}\n"))
    assert recipe == Recipe.model_validate({"name": "mine", "weights": {"bits": 4}})
    assert recipe.migration is None
    assert recipe.activations.bits == 8


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
