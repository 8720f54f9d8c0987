from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fastav.__main__ import main
from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.data.manifest import Manifest
from fastav.recipe.parse import load_recipe, to_toml
from fastav.task.classification import MultiLabel, SingleLabel
from fastav.task.metrics import Evaluation
from fastav.task.predictions import Predictions, write_predictions
from fastav.training.run_folder import RunFolder

EVIL = ["<script>alert(1)</script>", 'a" onload="x', "$x^2$ & co", "鳥 <b>", "plain"]


def fake_predictions(
    ids: Sequence[str], classes: Sequence[str], right: float, seed: int, several: bool = False
) -> Predictions:
    """Clips of all classes in turn, told right with the given probability."""
    rng = np.random.default_rng(seed)
    num_clips, num_classes = len(ids), len(classes)
    target_N = np.arange(num_clips) % num_classes
    logits = rng.normal(size=(num_clips, num_classes))
    told_N = np.where(rng.random(num_clips) < right, target_N, (target_N + 1) % num_classes)
    logits[np.arange(num_clips), told_N] += 9
    weights = np.exp(logits)
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    targets = np.eye(num_classes)[target_N] + (np.eye(num_classes)[(target_N + 2) % num_classes] if several else 0)
    return Predictions(
        ids=list(ids),
        classes=tuple(classes),
        probabilities_NK=probabilities.astype(np.float32),
        targets_NK=np.minimum(targets, 1).astype(np.float32),
        has_video_N=np.ones(num_clips, dtype=bool),
        has_audio_N=rng.random(num_clips) < 0.9,
    )


def fake_run(
    folder: Path,
    kind: str,
    predictions: Predictions,
    *,
    manifest: str = "gone/manifest.parquet",
    steps: int = 60,
    task=None,
) -> Path:
    """A run folder as training leaves it."""
    run = RunFolder(folder)
    task = task or SingleLabel()
    settings = load_recipe(None, ["--data.manifest", manifest, "--model.fusion.kind", kind, "--out", str(folder)])
    run.recipe.write_text(to_toml(msgspec.structs.replace(settings, task=task)))
    rng = np.random.default_rng(0)
    evaluation = task.evaluate(predictions, "test", resamples=100)
    for step in range(1, steps + 1):
        rates = {
            "clips_per_s": 90 + 10 * rng.random(),
            "step_ms": 170.0,
            "stall_pct": 3 * rng.random(),
            "mfu_pct": None,
            "peak_mem_gib": 1.5,
        }
        loss = float("nan") if step == 7 else 2 * 0.97**step + 0.2 * rng.random()
        run.append_metrics(
            {
                "step": step,
                "epoch": step / 10,
                "loss": loss,
                "lr": 1e-3 * (1 - step / steps),
                "grad_norm": 1 + rng.random(),
                **rates,
                "time": 0.0,
            }
        )
        if step % 20 == 0:
            run.append_metrics({"step": step, "eval": evaluation.metrics, "time": 0.0})
    run.evaluation.write_text(evaluation.to_json())
    write_predictions(run.predictions, predictions)
    run.write_status("done", step=steps, total_steps=steps)
    run.write_environment(device="cpu", world=1)
    run.skip("clip<1>", MediaError("videos/<broken>.mp4", "moov atom not found", "open"), 3)
    return folder


class Page(html.parser.HTMLParser):
    """What of a page could run, load or be unreadable: scripts, event handlers, outside addresses, missing alts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.handlers: list[str] = []
        self.without_alt: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {name: value or "" for name, value in attrs}
        self.handlers += [name for name in given if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "data", "action"):
            if name in given and not given[name].startswith(("#", "data:image/")) and tag != "a":
                self.outside.append(given[name])
        if (tag == "img" and not given.get("alt")) or (
            tag == "svg" and not (given.get("aria-label") and given.get("role") == "img")
        ):
            self.without_alt.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def plain(self) -> str:
        return " ".join(" ".join(self.text).split())


def read_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert not page.outside
    assert not page.handlers
    assert not page.without_alt
    assert not re.search(r"url\(\s*['\"]?(?!#)", text)
    assert "@import" not in text
    assert "#0a000" not in text  # every stand-in became a variable of the page
    return page


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs over the same 200 clips of 8 classes, as the quickstart leaves them, with their reports."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    ids, classes = [f"clip{n:04d}" for n in range(200)], [f"class {k}" for k in range(8)]
    for seed, (kind, right) in enumerate(
        {"video": 0.5, "audio": 0.45, "score": 0.52, "late": 0.97, "bottleneck": 1.0}.items()
    ):
        fake_run(
            folder / kind,
            kind,
            fake_predictions(ids, classes, right, seed),
            steps=60 if kind in ("video", "late") else 0,
        )
    assert main(["report", str(folder)]) == 0
    return folder


def test_every_run_gets_a_report_that_needs_nothing_else(runs):
    for kind in ("video", "audio", "score", "late", "bottleneck"):
        page = read_page(runs / kind / "report.html")
        assert kind in page.plain
        assert "moov atom not found" in page.plain
        assert "no pictures: the manifest gone/manifest.parquet no longer exists" in page.plain
        assert "Top-1, mean of classes, %" in page.plain
    assert read_page(runs / "late" / "report.html").tags.count("svg") == 8


def test_numbers_of_the_page_are_those_of_the_run(runs):
    one = Evaluation.from_json((runs / "late" / "metrics.json").read_text())
    plain = read_page(runs / "late" / "report.html").plain
    low, high = one.interval
    assert f"{one.value:.4g} Top-1, % (95 % interval {low:.1f} to {high:.1f}, 200 clips)" in plain
    assert (
        "The model is the bottleneck: 2 % of the time" in plain
        or "The model is the bottleneck: 1 % of the time" in plain
    )
    for row in one.per_class:
        assert f"{row.name} {row.clips} {row.top1_pct:.1f} {row.ap_pct:.1f} {row.log_loss_nats:.3f}" in plain


def test_comparison_sets_fusion_against_the_best_single_modality(runs, capsys):
    found = json.loads((runs / "results.json").read_text())
    assert found["best_single"] == "video"
    assert [row["run"] for row in found["runs"]] == ["video", "audio", "score", "late", "bottleneck"]
    by_name = {row["run"]: row for row in found["runs"]}
    assert "gain_pct" not in by_name["video"]
    best = by_name["bottleneck"]
    assert best["value"] == best["high"] == 100
    assert best["gain_pct"]["value"] == pytest.approx(100 - by_name["video"]["value"])
    assert best["gain_pct"]["low"] < best["gain_pct"]["value"] < best["gain_pct"]["high"]
    assert best["gain_pct"]["verdict"] == by_name["late"]["gain_pct"]["verdict"] == "better"
    assert by_name["score"]["gain_pct"]["verdict"] == "unclear"
    page = read_page(runs / "report.html")
    assert "bottleneck is better" in page.plain
    assert "Class by class" in page.plain
    assert main(["report", str(runs), "--clips", "0"]) == 0
    table = capsys.readouterr().out
    assert "bottleneck" in table
    assert "100" in table


def test_a_worse_fusion_is_told_as_worse(tmp_path):
    ids = [f"clip{n}" for n in range(300)]
    for kind, right in {"video": 0.9, "audio": 0.2, "late": 0.5}.items():
        fake_run(tmp_path / kind, kind, fake_predictions(ids, ["a", "b", "c"], right, 1))
    assert main(["report", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert rows[2]["gain_pct"]["verdict"] == "worse"
    assert "late is worse" in read_page(tmp_path / "report.html").plain


def test_names_stay_text(tmp_path):
    ids = [f"<img src=x onerror=alert({n})>" for n in range(25)]
    for kind, right in {"video": 0.5, "audio": 0.4, "late": 0.8}.items():
        fake_run(tmp_path / f"{kind}<b>", kind, fake_predictions(ids, EVIL, right, 1))
    assert main(["report", str(tmp_path)]) == 0
    for file in (tmp_path / "report.html", tmp_path / "late<b>" / "report.html"):
        page = read_page(file)
        for name in (
            "<script>alert(1)</sc",
            "$x^2$ & co",
            "鳥 <b>",
            'a" onload="x',
            "late<b>",
        ):  # charts cut long names
            assert name in page.plain, name
    assert "<img src=x onerror=alert(" in page.plain
    assert "img" not in page.tags


def test_pictures_of_the_best_and_worst_clips(made, tmp_path):
    manifest = Manifest.open(made, split="test")
    clips = manifest.clips(range(len(manifest)))
    ids = [clip.id for clip in clips]
    run = fake_run(tmp_path / "run", "late", fake_predictions(ids, manifest.classes, 0.6, 0), manifest=str(made))
    assert main(["report", str(run), "--clips", "2"]) == 0
    page = read_page(run / "report.html")
    assert page.tags.count("img") == 4 * 5  # of each clip four frames and a spectrogram
    assert "Most confident correct predictions" in page.plain
    assert "Worst predictions" in page.plain
    text = (run / "report.html").read_text()
    assert text.count("data:image/jpeg;base64,/9j/") == 20


def test_media_that_are_gone_are_noted_clip_by_clip(made, tmp_path):
    whole = Manifest.open(made, split="test")
    copy = tmp_path / "copy" / "manifest.parquet"
    copy.parent.mkdir()
    shutil.copy(made, copy)  # without its media
    run = fake_run(
        tmp_path / "run",
        "late",
        fake_predictions([whole.clip(0).id, "unknown"], whole.classes, 1.0, 0),
        manifest=str(copy),
    )
    assert main(["report", str(run)]) == 0
    plain = read_page(run / "report.html").plain
    assert "cannot be read:" in plain
    assert "unknown; no longer in the manifest" in plain


def test_a_relative_manifest_is_found_from_the_run_upwards(made, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(made.parent, target_is_directory=True)
    clip: Clip = Manifest.open(made, split="test").clip(0)
    given = fake_predictions([clip.id], Manifest.open(made).classes, 1.0, 0)
    run = fake_run(tmp_path / "runs" / "one", "video", given, manifest="data/manifest.parquet")
    monkeypatch.chdir("/")
    assert main(["report", str(run)]) == 0
    assert read_page(run / "report.html").tags.count("img") == 5


def test_a_run_that_has_just_begun(tmp_path):
    run = RunFolder(tmp_path / "begun")
    run.write_status("running", step=0, total_steps=10)
    run.append_metrics({"step": 1, "loss": None})
    assert main(["report", str(run.path)]) == 0
    plain = read_page(run.path / "report.html").plain
    assert "Not evaluated yet" in plain
    assert "running, step 0 of 10" in plain


def test_a_split_without_labels_and_an_absent_class(tmp_path):
    given = fake_predictions([f"clip{n}" for n in range(10)], ["a", "b", "c"], 1.0, 0)
    given.targets_NK[:, 2] = 0
    run = fake_run(tmp_path / "absent", "video", given)
    unlabelled = fake_predictions([f"clip{n}" for n in range(10)], ["a", "b", "c"], 1.0, 0)
    unlabelled.targets_NK[:] = 0
    fake_run(tmp_path / "unlabelled", "late", unlabelled)
    assert main(["report", str(tmp_path)]) == 0
    assert "no clips" in read_page(run / "report.html").plain
    assert "unlabelled: not evaluated yet, or no clip has a label" in read_page(tmp_path / "report.html").plain


def test_multi_label_runs(tmp_path):
    ids, classes = [f"clip{n}" for n in range(60)], [f"c{k}" for k in range(5)]
    for kind, right in {"video": 0.5, "audio": 0.4, "late": 0.9}.items():
        fake_run(tmp_path / kind, kind, fake_predictions(ids, classes, right, 2, several=True), task=MultiLabel())
    assert main(["report", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert {row["main"] for row in rows} == {"map_macro_pct"}
    assert rows[2]["gain_pct"]["verdict"] == "no interval"
    read_page(tmp_path / "report.html")


def test_many_classes(tmp_path):
    classes = [f"species number {k}" for k in range(170)]
    given = fake_predictions([f"clip{n}" for n in range(340)], classes, 0.7, 0)
    page = read_page_of(fake_run(tmp_path / "run", "video", given))
    assert len((tmp_path / "run" / "report.html").read_bytes()) < 1_000_000
    assert "Table of the 170 classes" in page.plain


def read_page_of(run: Path) -> Page:
    assert main(["report", str(run)]) == 0
    return read_page(run / "report.html")


def test_runs_named_one_by_one_are_compared_in_their_common_folder(tmp_path):
    ids = [f"clip{n}" for n in range(40)]
    for name, kind in {"a/one": "video", "b/two": "late"}.items():
        fake_run(tmp_path / name, kind, fake_predictions(ids, ["x", "y"], 0.7, len(name)))
    assert main(["report", str(tmp_path / "a" / "one"), str(tmp_path / "b" / "two")]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [row["run"] for row in rows] == ["a/one", "b/two"]
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").exists()


def test_other_splits_and_classes_are_not_compared(tmp_path):
    ids = [f"clip{n}" for n in range(40)]
    fake_run(tmp_path / "video", "video", fake_predictions(ids, ["x", "y"], 0.7, 0))
    fake_run(tmp_path / "late", "late", fake_predictions(ids, ["x", "z"], 0.7, 0))
    assert main(["report", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert "gain_pct" not in found["runs"][1]
    assert found["notes"] == ["late: not compared with video: different split, task or classes"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"quickstrat: no such folder; did you mean \"quickstart\"\?"),
        (
            lambda folder: (folder / "quickstrat").mkdir(),
            r"neither a run \(a folder with recipe.toml\) nor a folder that contains runs",
        ),
        (lambda folder: put(folder, "metrics.json", "{"), r"metrics\.json: not the metrics of an evaluation"),
        (lambda folder: put(folder, "recipe.toml", "= 1"), r"recipe\.toml: not valid TOML"),
        (
            lambda folder: put(folder, "recipe.toml", "", "predictions.parquet"),
            r"predictions\.parquet: not a file of predictions",
        ),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, make, message):
    (tmp_path / "quickstart").mkdir()
    make(tmp_path)
    assert main(["report", str(tmp_path / "quickstrat")]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert told.count("\n") == 1


def put(folder: Path, name: str, text: str, also: str = "") -> None:
    run = folder / "quickstrat"
    run.mkdir()
    (run / name).write_text(text)
    if also:
        (run / also).write_text("no parquet")
