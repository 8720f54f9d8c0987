"""Reads recipes: files, their bases and command-line overrides become one checked `Recipe`, and a recipe a file again.

The file (and the files its `base` names) and the overrides are merged as plain tables onto the defaults, then parsed
once against the typed structs: file and command line are typed and spell-checked alike, and the command line beats
the file, which beats its base, which beats the defaults. Choosing another `kind` in a table drops the options of the
kind before it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tomli_w
from msgspec import inspect

from fastav.core.config import Config
from fastav.core.errors import UserError, did_you_mean
from fastav.core.external import is_external
from fastav.media.spectrogram import PRESETS, Frontend
from fastav.optim.schedule import Plateau
from fastav.recipe.schema import Recipe

Table = dict[str, Any]


# Keys that may differ when a run is resumed: they change speed, place or verbosity, never the numbers.
CHANGEABLE = (
    "out",
    "data.manifest",  # may move; its digest is compared instead
    "data.aliases",  # likewise
    "data.shards",
    "train.micro_batch",
    "train.eval_every",
    "train.num_processes",
    "train.strategy",
    "train.bucket_mb",
    "train.activation_checkpointing",
    "train.patience_s",
    "guard.limit",
    "guard.on_non_finite",  # a step that is not finite is never taken
    "guard.slow_rank",
    "guard.preflight",
    "guard.slow_device",
    "guard.on_slow_device",
    "guard.preflight_patience_s",
    "decode",
    "loading",
    "saving",
    "log",
    "model.video.init_from",  # read once, before the first step
    "model.audio.init_from",
    "model.init_from",
    "model.video.weights",
    "model.audio.weights",
)


# Keys that older versions had, and where they are now.
RENAMED = {"train.max_bad_steps": "guard.limit"}


def renewed(table: Table) -> Table:
    """Returns a recipe's table as an older version saved it with the keys of this one."""
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        if key in table.get(section, {}):
            target, _, name = new.partition(".")
            table.setdefault(target, {})[name] = table[section].pop(key)
    return table


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: TOML file; None for the defaults alone.
        overrides: Command-line words such as `["--optim.lr", "1e-4", "--model.fusion.kind=late"]`.

    Returns:
        The recipe with defaults filled in and `out` and `init_from` made definite.

    Raises:
        UserError: A file that is missing or not TOML, an unknown key, kind or preset, or a value of the wrong type.
    """
    origins: dict[str, str] = {}
    table = _read_toml(Path(path), origins) if path is not None else {}
    words = sorted(parse_overrides(overrides), key=lambda pair: not pair[0].endswith(".kind"))  # kinds first
    for key, value in words:
        _put(table, key, value)
        origins[key] = f"--{key}"
    recipe = parse_recipe(table, origins, default_origin=str(path or "command line"))
    if not recipe.out:
        recipe = msgspec.structs.replace(recipe, out=f"runs/{Path(path).stem if path else 'default'}")
    return _find_runs(recipe)


def parse_recipe(table: Table, origins: Mapping[str, str], default_origin: str) -> Recipe:
    """Merges a table onto the defaults and parses the result; `origins` maps dotted keys to a file or flag."""

    def fail(key: str, message: str) -> UserError:
        return UserError(f"{_origin(key, origins, default_origin)}: {message}")

    merged = _merge(inspect.type_info(Recipe), to_table(Recipe()), table, "", fail)
    try:
        return msgspec.convert(merged, Recipe, strict=True)
    except msgspec.ValidationError as error:
        found = re.fullmatch(r"(.*?)(?: - at `\$\.?(.*?)`)?", str(error), flags=re.S)
        assert found is not None
        key = re.sub(r"\[.*", "", found[2] or "")
        given = _get(merged, key)
        message = found[1].replace("Expected ", "expected ").replace("`", "")
        raise fail(key, f"{key} = {given!r}: {message}" if key else message) from None


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, raw value) of `--key value` and `--key=value` words.

    Raises:
        UserError: A word that is no `--key`, or a key without its value.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise UserError(f'command line: unexpected "{word}"; expected --section.key VALUE')
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key}: a value is missing; expected --{key} VALUE")
            value = rest.pop(0)
        yield key.replace("-", "_"), value


def to_table(config: Any) -> Table:
    """A config as plain tables and lists, without the None values that TOML has no word for."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value

    return clean(msgspec.to_builtins(config))


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML; reading it back gives an equal recipe."""
    return tomli_w.dumps(to_table(recipe))


def show_recipe(recipe: Recipe) -> str:
    """The resolved recipe as TOML, what differs from the defaults marked by a comment at the end of the line."""
    defaults = _defaults_of(recipe)
    lines, section = [], ""
    for line in to_toml(recipe).splitlines():
        header = re.fullmatch(r"\[(.*)\]", line)
        if header:
            section = header[1] + "."
        key = re.match(r"([\w-]+) = ", line)
        if key:
            default = _get(defaults, section + key[1])
            if default != _get(to_table(recipe), section + key[1]):
                line = f"{line}  # default: {'none' if default is None else default!r}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def structs_of(node: Any) -> list[inspect.StructType]:
    """The structs that a type stands for: one, or one of each kind; none where it is a plain value."""
    return [one for one in getattr(node, "types", (node,)) if isinstance(one, inspect.StructType)]


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ and that are not `CHANGEABLE`: key -> (old, new).

    A plateau schedule goes by the evaluations, so with one their times and metric may not change either.
    """
    before, after = dict(leaves(to_table(old))), dict(leaves(to_table(new)))
    fixed = ("train.eval_every", "saving.best") if isinstance(new.optim.schedule, Plateau) else ()
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and (key in fixed or not any(key == may or key.startswith(may + ".") for may in CHANGEABLE))
    }


def _read_toml(path: Path, origins: dict[str, str], seen: tuple[Path, ...] = ()) -> Table:
    if path.resolve() in seen:
        raise UserError(f'{path}: "base" leads back to this file')
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such recipe{did_you_mean(path.name, names)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    base = table.pop("base", None)
    merged: Table = {}
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base = {base!r}: expected the name of a recipe file beside this one")
        merged = _read_toml(path.parent / base, origins, (*seen, path.resolve()))
    for key, _ in leaves(table):
        origins[key] = str(path)
    return _overlay(merged, table)


def _overlay(under: Table, over: Table) -> Table:
    """Puts one file's tables over its base's; a table with another `kind` replaces the one below whole."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = value
        if isinstance(value, dict) and isinstance(below, dict):
            kind = below.get("kind")
            if value.get("kind", kind) == kind:
                result[key] = _overlay(below, value)
    return result


def _keys(table: Mapping[str, Any], place: str) -> Iterator[str]:
    """Yields all keys of a table and those below it, such as `data.manifest`."""
    for name, value in table.items():
        yield place + name
        if isinstance(value, Mapping):
            yield from _keys(value, f"{place}{name}.")


def _merge(node: Any, base: Any, over: Any, key: str, fail: Any) -> Any:
    """Lays `over` onto the defaults `base`, checking keys and kinds against the type `node`."""
    if isinstance(node, inspect.Metadata):
        node = node.type
    structs = structs_of(node)
    if not structs:
        if isinstance(over, dict):  # a table of free keys, such as a tower's args
            return {**(base or {}), **{name: _typed(inspect.AnyType(), value) for name, value in over.items()}}
        return _typed(node, over)
    if not isinstance(over, dict):
        raise fail(key, f"{key} = {over!r}: expected a table, [{key}]")
    if structs[0].tag_field:
        kind, kinds = over.get("kind", (base or {}).get("kind")), {s.tag: s for s in structs}
        if is_external(str(kind)) and "external" in kinds:
            over, kind = _as_external(over), "external"
        if kind not in kinds:
            raise fail(f"{key}.kind", f'{key}.kind = "{kind}" is unknown{did_you_mean(str(kind), map(str, kinds))}')
        struct = kinds[kind]
        if kind != (base or {}).get("kind"):
            base = to_table(struct.cls())
    else:
        struct = structs[0]
    if struct.cls is Frontend and "preset" in over:
        if over["preset"] not in PRESETS:
            raise fail(
                f"{key}.preset",
                f'{key}.preset = "{over["preset"]}" is unknown{did_you_mean(str(over["preset"]), PRESETS)}',
            )
        base = to_table(PRESETS[over["preset"]])
    fields = {f.name: f.type for f in struct.fields}
    result = dict(base or {})
    for name, value in over.items():
        path = f"{key}.{name}" if key else name
        if name == "kind" and struct.tag_field:
            result[name] = str(value)
        elif name not in fields:
            options = {(f"{key}." if key else "") + f for f in fields}
            of = f' (kind "{struct.tag}")' if struct.tag_field else ""
            deeper = [long for long in _keys(to_table(Recipe()), "") if long.endswith(f".{name}")] if not key else []
            near = f'; did you mean "{min(deeper, key=len)}"?' if deeper else did_you_mean(path, options)
            raise fail(path, f'unknown key "{path}"{of}{near}')
        else:
            result[name] = _merge(fields[name], result.get(name), value, path, fail)
    return result


def _as_external(over: Table) -> Table:
    """Writes `kind = "module:attribute"` with its settings beside it in full."""
    own = {name: value for name, value in over.items() if name not in ("kind", "args")}
    return {"kind": "external", "factory": str(over["kind"]), "args": {**over.get("args", {}), **own}}


def _typed(node: Any, value: Any) -> Any:
    """Reads a command-line word as TOML unless text is what the key holds; a value from a file stays as it is."""
    if not isinstance(value, _Word):
        return value
    text = str(value)
    if isinstance(node, (inspect.StrType, inspect.LiteralType)):
        return text
    if isinstance(node, inspect.VarTupleType) and not text.startswith("["):
        text = f"[{text}]" if _is_toml(f"[{text}]") else str(text.split(","))
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return None if text == "none" else text


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        return False
    return True


class _Word(str):
    """A value as typed on the command line, not yet read by its key's type."""


def _put(table: Table, key: str, value: str) -> None:
    """Sets a dotted key to a command-line word; a new `kind` drops the options of the kind before it."""
    *path, last = key.split(".")
    for name in path:
        below = table.setdefault(name, {})
        if not isinstance(below, dict):
            raise UserError(f'--{key}: "{name}" is a value, not a table')
        table = below
    if last == "kind" and table.get("kind", value) != value:
        table.clear()
    table[last] = _Word(value)


def _get(table: Any, key: str) -> Any:
    for name in key.split("."):
        table = table.get(name) if isinstance(table, dict) else None
    return table


def leaves(table: Table, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted key and value of everything in a table that is no table itself, or an empty one."""
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _origin(key: str, origins: Mapping[str, str], default: str) -> str:
    while key:
        for known in (key, *(k for k in origins if k.startswith(key + "."))):
            if known in origins:
                return origins[known]
        key = key.rpartition(".")[0]
    return default


def _defaults_of(recipe: Recipe) -> Table:
    """The defaults of the kinds and the preset that the recipe chose."""

    def defaults(config: Any) -> Any:
        if isinstance(config, Frontend):
            return to_table(PRESETS[config.preset])
        if not isinstance(config, Config):
            return None
        own = to_table(type(config)())
        for field in msgspec.structs.fields(config):
            value = getattr(config, field.name)
            if isinstance(value, Config):
                own[field.name] = defaults(value)
        return own

    return defaults(recipe)


def _find_runs(recipe: Recipe) -> Recipe:
    """Makes each tower's `init_from` a path: a bare name is the run of that name beside this one."""
    model = recipe.model
    for modality in ("video", "audio"):
        tower = getattr(model, modality)
        if tower.init_from and Path(tower.init_from).name == tower.init_from:
            beside = Path(recipe.out).parent / tower.init_from
            tower = msgspec.structs.replace(tower, init_from=str(beside))
            model = msgspec.structs.replace(model, **{modality: tower})
    return msgspec.structs.replace(recipe, model=model)
