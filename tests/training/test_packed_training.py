"""Packed clips through plan, loader and training: near and far, in either order."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastav.__main__ import main
from fastav.data.manifest import Manifest, write_manifest
from fastav.recipe.parse import load_recipe
from fastav.training.inputs import make_loader, make_plan, training_source
from tests.helpers.range_server import serving


@pytest.fixture(scope="module")
def pack(packed):
    return Manifest.open(packed)


def recipe_of(pack, tiny, out, *more):
    words = tiny("late", out, *more)
    words[words.index("--data.manifest") + 1] = str(pack.path)
    return words


def trained(folder, words):
    recipe = folder / "recipe.toml"
    recipe.write_text("")
    return main(["train", str(recipe), *words])


def first_batches(words, count=3):
    recipe = load_recipe(None, words)
    broken = []
    with make_loader(recipe, training_source(recipe), lambda clip, error: broken.append(str(error))) as loader:
        batches = list(loader.batches([("train", 8 * i, 8) for i in range(count)]))
    assert broken == []
    return batches


def test_a_run_on_a_pack(pack, tiny, tmp_path):
    assert (
        trained(
            tmp_path, [*recipe_of(pack, tiny, tmp_path / "run", "--sampling.order", "blocked", "--sampling.block", "4")]
        )
        == 0
    )
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    assert not (tmp_path / "run" / "skipped.csv").exists()


def test_near_and_far_give_the_same_batches(pack, tiny, tmp_path):
    near = first_batches(recipe_of(pack, tiny, tmp_path / "a"))
    with serving(pack.root) as server:
        words = recipe_of(pack, tiny, tmp_path / "b", "--data.shards", server.url)
        far = first_batches(words)
        fetched = server.num_bytes
        cached = [*words, "--loading.shards.cache", str(tmp_path / "cache"), "--loading.shards.fill_mib", "1"]
        for _ in range(2):
            again = first_batches(cached)
        assert fetched > 0
        assert server.num_bytes - fetched <= sum(p.stat().st_size for p in (pack.root / "shards").glob("*.tar"))
    for one, two, three in zip(near, far, again, strict=True):
        for name in ("frames_BTCHW", "mel_BWCML", "targets_BK"):
            assert torch.equal(getattr(one, name), getattr(two, name))
            assert torch.equal(getattr(one, name), getattr(three, name))


def test_a_blocked_epoch_visits_every_clip_once(pack, tiny, tmp_path):
    recipe = load_recipe(
        None,
        recipe_of(
            pack,
            tiny,
            tmp_path / "a",
            "--sampling.order",
            "blocked",
            "--sampling.block",
            "4",
            "--sampling.block_window",
            "2",
        ),
    )
    source = training_source(recipe)
    plan = make_plan(recipe, source)
    count = source.num_clips
    rows = plan.train(0, 2 * count).row_B
    assert sorted(rows[:count].tolist()) == sorted(rows[count:].tolist()) == list(range(count))
    assert rows[:count].tolist() != rows[count:].tolist()
    alone = [int(plan.train(i, 1).row_B[0]) for i in range(0, count, 5)]
    assert alone == rows[:count:5].tolist()
    near = [np.unique(rows[i : i + 8] // 4).size for i in range(0, count - 8, 8)]
    assert np.mean(near) <= 4  # eight clips of two blocks, which the turn may tear in two more


def test_shards_that_are_gone_are_an_error_of_the_run(pack, tiny, tmp_path, capsys):
    words = recipe_of(pack, tiny, tmp_path / "a", "--data.shards", str(tmp_path / "nowhere"))
    assert trained(tmp_path, [*words]) == 2
    told = capsys.readouterr().err
    assert "nowhere/shards/000000.tar: shard: no such file" in told
    assert "set --data.shards to their folder or URL" in told
    dead = [*words, "--data.shards", "http://127.0.0.1:9/pack", "--loading.shards.retries", "0"]
    assert trained(tmp_path, dead) == 2
    assert "its shards cannot be read (http://127.0.0.1:9/pack/shards/000000.tar" in capsys.readouterr().err


def test_new_clips_of_one_split_are_evaluated(pack, tiny, tmp_path):
    assert trained(tmp_path, recipe_of(pack, tiny, tmp_path / "run")) == 0
    only = pack.split("test")
    write_manifest(tmp_path / "new.parquet", only.clips(range(len(only))), pack.classes)
    assert main(["evaluate", str(tmp_path / "run"), str(tmp_path / "new.parquet")]) == 0
    train = [replace(clip, split="train") for clip in only.clips(range(len(only)))]
    write_manifest(tmp_path / "train.parquet", train, pack.classes)
    assert main(["evaluate", str(tmp_path / "run"), str(tmp_path / "train.parquet")]) == 0
