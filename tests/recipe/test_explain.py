"""`fastav recipe explain`: every key of a recipe has a meaning, and what it says of its values is what is taken."""

from __future__ import annotations

import pytest

from fastav.__main__ import main
from fastav.core.errors import UserError
from fastav.recipe.explain import Key, explain, keys
from fastav.recipe.parse import leaves, load_recipe, to_table
from fastav.recipe.schema import Recipe


@pytest.mark.parametrize("key", keys(), ids=lambda key: key.name + key.kind)
def test_every_key_is_explained_and_takes_the_default_that_is_told(key: Key) -> None:
    assert len(key.meaning) > 8, f"{key.name}: its struct's docstring does not say what it is"
    assert key.meaning.endswith("."), key.meaning
    table = key.name.rpartition(".")[0]
    chosen = ["--" + f"{table}.kind", key.kind] if key.kind else []
    plain = load_recipe(None, chosen)
    default = key.default.strip('"')
    if default == "{}":  # a table of free keys
        return
    assert load_recipe(None, [*chosen, f"--{key.name}={default}"]) == plain


def test_all_keys_of_a_default_recipe_are_there() -> None:
    have = {key.name for key in keys()}
    assert {name for name, _ in leaves(to_table(Recipe()))} <= have


def test_a_key_is_explained_by_its_values_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "explain", "optim.ema"]) == 0
    assert capsys.readouterr().out == (
        "optim.ema = 0.0\n"
        "    number at least 0 and below 1. Decay of the exponentially averaged weights, which are\n"
        "    evaluated and saved instead of the trained ones; 0 disables averaging.\n"
    )


def test_a_table_a_last_word_and_an_option_are_explained() -> None:
    assert "optim.schedule.kind" in explain(["optim.schedule"])
    assert explain(["patience"]) == explain(["optim.schedule.patience"])
    assert explain(["--train.micro-batch"]) == explain(["train.micro_batch"])
    assert explain(["optim.lr", "lr"]).count("optim.lr =") == 1


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r'no recipe has a key "train.best"; did you mean "saving.best"\?'):
        explain(["train.best"])
    with pytest.raises(UserError, match=r'no recipe has a key "optim.lrr"; did you mean "optim.lr"\?'):
        explain(["optim.lrr"])


def test_show_takes_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "a.toml", "b.toml"]) == 2
    assert "got 2 files, expected one" in capsys.readouterr().err
