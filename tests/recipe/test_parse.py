"""Recipes: file and command line are merged, typed and spell-checked alike; each mistake is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastav.__main__ import main
from fastav.core.errors import UserError
from fastav.model.av_model import Model
from fastav.model.fusion import Bottleneck, Late, Score
from fastav.recipe.parse import CHANGEABLE, differences, load_recipe, parse_recipe, show_recipe, to_table, to_toml
from fastav.recipe.schema import Recipe
from tests import ROOT

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.toml"))


@pytest.fixture
def write(tmp_path):
    def make(text: str, name: str = "r.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_survives_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    again = tmp_path / "again.toml"
    again.write_text(to_toml(recipe))
    assert load_recipe(again) == recipe


def test_there_are_recipes():
    assert len(RECIPES) >= 20


def test_command_line_beats_file_beats_base_beats_default(write):
    write("[optim]\nlr = 1.0\nweight_decay = 0.5\n[train]\nbatch = 8\n", "base.toml")
    path = write('base = "base.toml"\n[optim]\nlr = 2.0\n')
    assert load_recipe(path).optim.lr == 2.0
    assert load_recipe(path).optim.weight_decay == 0.5
    assert load_recipe(path).train.batch == 8
    assert load_recipe(path).train.seed == Recipe().train.seed
    recipe = load_recipe(path, ["--optim.lr", "3e-4", "--train.batch=4"])
    assert recipe.optim.lr == 3e-4
    assert recipe.train.batch == 4


def test_another_kind_drops_the_options_of_the_kind_before(write):
    path = write('[model.fusion]\nkind = "bottleneck"\nstart = 2\ntokens = 6\n')
    assert load_recipe(path).model.fusion == Bottleneck(start=2, tokens=6)
    assert load_recipe(path, ["--model.fusion.kind", "late"]).model.fusion == Late()
    assert load_recipe(path, ["--model.fusion.weight", "0.3", "--model.fusion.kind", "score"]).model.fusion == Score(
        weight=0.3
    )
    over = write(f'base = "{path.name}"\n[model.fusion]\nkind = "late"\n', "over.toml")
    assert load_recipe(over).model.fusion == Late()


def test_a_preset_is_a_base_that_single_keys_override(write):
    recipe = load_recipe(write('[frontend]\npreset = "inatsounds"\nnum_mels = 64\n'))
    assert (recipe.frontend.sample_rate, recipe.frontend.num_mels) == (22_050, 64)
    again = parse_recipe(to_table(recipe), {}, "again")
    assert again == recipe


def test_values_of_the_command_line_take_the_type_of_their_key():
    recipe = load_recipe(
        None,
        [
            "--out", "2024", "--sampling.crop_scale", "[0.5, 1.0]", "--sampling.eval_windows", "0,150",
            "--model.video.args.depth", "4", "--model.video.args.global_pool", "avg", "--train.compile", "true",
            "--log.trackers", "tensorboard,wandb", "--frontend.mean", "-30",
        ],
    )  # fmt: skip
    assert recipe.out == "2024"
    assert recipe.sampling.crop_scale == (0.5, 1.0)
    assert recipe.sampling.eval_windows == (0, 150)
    assert recipe.model.video.args == {"depth": 4, "global_pool": "avg"}
    assert recipe.train.compile is True
    assert recipe.log.trackers == ("tensorboard", "wandb")
    assert recipe.frontend.mean == -30.0


MISTAKES = [
    ("[optim]\nlrr = 1\n", [], ["r.toml", '"optim.lrr"', 'did you mean "optim.lr"?']),
    ("", ["--optim.lrr", "1"], ["--optim.lrr", 'did you mean "optim.lr"?']),
    ("[train]\nbest = true\n", [], ["r.toml", '"train.best"', 'did you mean "saving.best"?']),  # in another table
    ("[optims]\nlr = 1\n", [], ['"optims"', 'did you mean "optim"?']),
    ('[model.fusion]\nkind = "bottelneck"\n', [], ["r.toml", 'did you mean "bottleneck"?']),
    ("", ["--model.fusion.kind", "lates"], ["--model.fusion.kind", 'did you mean "late"?']),
    ('[model.fusion]\nkind = "late"\ntokens = 4\n', [], ['"model.fusion.tokens"', 'kind "late"']),
    ('[optim]\nlr = "fast"\n', [], ["r.toml", "optim.lr = 'fast'", "expected float"]),
    ("", ["--optim.lr", "fast"], ["--optim.lr", "'fast'", "expected float"]),
    ("", ["--train.batch", "0"], ["--train.batch", "expected int >= 1"]),
    ("", ["--train.batch", "1.5"], ["--train.batch", "1.5", "expected int"]),
    ("", ["--train.precision", "fp61"], ["--train.precision", "fp61"]),
    ('[frontend]\npreset = "ssw06"\n', [], ["r.toml", 'did you mean "ssw60"?']),
    ("optim = 3\n", [], ["r.toml", "expected a table [optim]"]),
    ("", ["--optim", "3"], ["--optim", "expected a table"]),
    ("", ["--optim.lr"], ["--optim.lr has no value"]),
    ("", ["--optim.lr", "--train.batch", "3"], ["--optim.lr has no value"]),
    ("", ["optim.lr=3"], ['unexpected "optim.lr=3"']),
    ("", ["--out.name", "x"], ["--out.name"]),
    ("a = = 3\n", [], ["r.toml", "not valid TOML"]),
    ('base = "other.toml"\n', [], ["other.toml", "no such recipe"]),
    ('base = "r.toml"\n', [], ["refers back"]),
    ("base = 3\n", [], ["expected the name of a recipe file"]),
]


@pytest.mark.parametrize(("text", "words", "parts"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line_that_names_what_where_and_the_nearest(write, text, words, parts):
    with pytest.raises(UserError) as caught:
        load_recipe(write(text), words)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_a_missing_recipe_names_the_nearest_file(write):
    path = write("")
    with pytest.raises(UserError, match=r'no such recipe; did you mean "r\.toml"'):
        load_recipe(path.with_name("rr.toml"))


def test_the_run_folder_follows_the_recipes_name_and_towers_find_sibling_runs(write):
    path = write('[model.video]\ninit_from = "video"\n', "fuse.toml")
    assert load_recipe(path).out == "runs/fuse"
    assert load_recipe(path, ["--out", "a/b/fuse"]).model.video.init_from == str(Path("a/b/video"))


def test_show_marks_what_differs_from_the_defaults(write):
    text = show_recipe(load_recipe(write('[optim]\nlr = 0.25\n[model.fusion]\nkind = "score"\nweight = 0.25\n')))
    lines = text.splitlines()
    assert any(line.startswith("lr = 0.25  # default: ") for line in lines)
    assert any(line.startswith("weight = 0.25  # default: 0.5") for line in lines)
    assert "batch = 64" in lines
    path = write(text, "shown.toml")
    assert load_recipe(path).model.fusion == Score(weight=0.25)


def test_differences_ignore_what_may_change():
    old, new = (
        load_recipe(None),
        load_recipe(None, ["--loading.workers", "3", "--optim.lr", "1", "--out", "x", "--decode.kind", "pyav"]),
    )
    assert list(differences(old, new)) == ["optim.lr"]
    plateau = ["--optim.schedule.kind", "plateau"]
    other = [*plateau, "--train.eval_every", "2"]
    assert list(differences(load_recipe(None, plateau), load_recipe(None, other))) == ["train.eval_every"]
    for key in CHANGEABLE:
        table = to_table(old)
        for name in key.split("."):
            table = table[name] if name in table else pytest.fail(f"CHANGEABLE names an unknown key: {key}")


def test_the_defaults_are_a_model():
    assert isinstance(Recipe().model, Model)


def test_the_verb_prints_the_resolved_recipe(write, capsys):
    path = write("[train]\nbatch = 8\n")
    assert main(["recipe", "show", str(path), "--train.seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert "batch = 8  # default: 64" in shown
    assert "seed = 3  # default: 0" in shown
    assert main(["recipe", "shwo", str(path)]) == 2
    assert 'did you mean "show"?' in capsys.readouterr().err


def test_a_key_without_its_table_is_known_by_its_last_word():
    with pytest.raises(UserError, match=r'--manifest: unknown key "manifest"; did you mean "data.manifest"\?'):
        load_recipe(None, ["--manifest", "x"])
    with pytest.raises(UserError, match=r'unknown key "lr"; did you mean "optim.lr"\?'):
        load_recipe(None, ["--lr", "1"])
