"""iNatSounds 2024: recordings of animals from iNaturalist, one species each.

ROOT contains one or more of train.json, val.json and test.json, and the recordings in train/, val/ and test/
(SPLIT/CATEGORY/RECORDING.wav). Each clip is a whole recording, of any length. The classes are the scientific names of
the 5,569 species for training; the 1,212 species with "evaluation": 1 are evaluated. Invalid coordinates are dropped.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip
from fastav.data.manifest import Problem
from fastav.datasets.clip_list import ClipList
from fastav.datasets.tables import ClipRows, MediaFolders, class_order, coordinates, find_file

METRIC = (
    "one label per recording; its scores are the mean softmax over windows of 3 s every 1.5 s, with classes that are "
    "not in the split masked: class-averaged top-1 and top-5, macro AP over the classes of the split, and F1 at each "
    "class's best threshold, all of them also per supercategory"
)
SPLITS = ("train", "val", "test")

# The published suffix first, then those of converted copies.
_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder with train.json, val.json, test.json")
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        metavar="SPLIT",
        help="splits to index: train, val, test; by default all that have a .json file",
    )


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the recordings of the splits that have a media file.

    Raises:
        UserError: A table is missing or malformed, or none of the recordings exists.
    """
    root = Path(args.root)
    what = "table of iNatSounds (train.json, val.json or test.json)"
    wanted = args.splits or [split for split in SPLITS if (root / f"{split}.json").is_file()] or SPLITS[:1]
    tables = {split: find_file(root, (f"{split}.json",), what) for split in wanted}
    rows, folders = ClipRows(), MediaFolders()
    categories: dict[int, Mapping[str, Any]] = {}
    for split, table in tables.items():
        content = _read(table)
        categories |= _by_id(content["categories"], table)
        _split(rows, folders, root, split, table, content)
    known = [categories[k] for k in sorted(categories)]
    absent = [split for split in SPLITS if not (root / f"{split}.json").is_file()]
    metadata = {
        "source": "fastav index inatsounds",
        "root": str(root),
        "splits": " ".join(tables),
        "metric": METRIC,
        "class_order": class_order(c["name"] for c in known),
        "evaluated_classes": class_order(c["name"] for c in known if c.get("evaluation") == 1),
        "supercategories": json.dumps({c["name"]: c.get("supercategory", "") for c in known}, ensure_ascii=False),
    }
    notes = [f"{root}: no {split}.json, so there is no {split} split" for split in absent]
    return rows.clip_list(tables.values(), metadata, notes=notes)


def _split(
    rows: ClipRows, folders: MediaFolders, root: Path, split: str, table: Path, content: Mapping[str, list[Any]]
) -> None:
    """Adds the recordings of one split."""
    names = _class_names(content["categories"], table)
    folder_of = {entry["id"]: str(entry.get("audio_dir_name") or "") for entry in content["categories"]}
    found: dict[int, list[int]] = defaultdict(list)
    for entry in content["annotations"]:
        audio_id, category_id = _field(entry, "audio_id", int, table), _field(entry, "category_id", int, table)
        if category_id not in names:
            raise UserError(
                f"{table}: an annotation of audio {audio_id} has category {category_id}, which is not in categories"
            )
        if category_id not in found[audio_id]:
            found[audio_id].append(category_id)
    for entry in content["audio"]:
        audio_id, file_name = _field(entry, "id", int, table), _field(entry, "file_name", str, table)
        name = f"{split}/{audio_id}"  # ids may be the same in another split
        places = _places(split, file_name, [folder_of[k] for k in found[audio_id]])
        paths = [folders.find_media(root / place.parent, place.stem, _SUFFIXES) for place in places]
        path = next((path for path in paths if path is not None), None)
        if path is None:
            rows.add_missing(name, root / places[0], table)
        elif not found[audio_id]:
            message = f"{table}: audio {audio_id} ({path}) has no annotation; left out"
            rows.problems.append(Problem("no_label", name, str(path), message, False))
        else:
            labels = tuple(names[k] for k in found[audio_id])
            lat, lon = coordinates(entry.get("latitude"), entry.get("longitude"))
            rows.add(Clip(name, audio=path, labels=labels, split=split, group=name, lat=lat, lon=lon), table)


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # neither JSON nor UTF-8
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object with audio, categories and annotations at the top level")
    for key in ("audio", "categories", "annotations"):
        if not isinstance(content.get(key), list):
            raise UserError(f'{path}: no list "{key}"{did_you_mean(key, set(content) - {key})}')
    return content


def _field(entry: Any, key: str, kind: type, path: Path) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        expected = "a number" if kind is int else "a non-empty text"
        raise UserError(f'{path}: "{key}" of {json.dumps(entry)[:120]}: expected {expected}')
    return value


def _by_id(categories: list[Any], path: Path) -> dict[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}
    for entry in categories:
        number = _field(entry, "id", int, path)
        if number in found:
            raise UserError(f"{path}: category {number} is listed twice, expected once")
        found[number] = entry
    return found


def _class_names(categories: list[Any], path: Path) -> dict[int, str]:
    """Returns category id -> scientific name; raises `UserError` if two categories have the same name."""
    names = {number: _field(entry, "name", str, path) for number, entry in _by_id(categories, path).items()}
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise UserError(f'{path}: two categories have the name "{twice}"; expected unique names')
    return names


def _places(split: str, file_name: str, categories: list[str]) -> list[PurePosixPath]:
    """Returns possible paths of a recording relative to ROOT, the published layout first.

    The data set does not document whether `file_name` includes the folders of split and category.
    """
    name = PurePosixPath(file_name)
    inner = name if name.parts[:1] == (split,) else PurePosixPath(split) / name
    return [inner, *(PurePosixPath(split) / category / name.name for category in categories if category)]
