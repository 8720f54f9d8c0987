"""Reads recipes: merges a TOML file, its `base` files and command-line overrides into one checked `Recipe`.

The tables are merged onto the defaults and parsed once against the typed structs, so keys and types of files and
command line are checked in the same way. Order of precedence: command line, file, base file, defaults. A different
`kind` in a table drops the options of the previous kind.
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
from fastav.core.plugin import is_external
from fastav.media.spectrogram import PRESETS, Frontend
from fastav.optim.schedule import Plateau
from fastav.recipe.schema import Recipe

Table = dict[str, Any]


# Keys that may differ when a run is resumed. They change speed, paths or verbosity, never the results.
CHANGEABLE = (
    "out",
    "data.manifest",  # the file may move; its digest is compared instead
    "data.aliases",  # the file may move; its content is compared instead
    "data.shards",
    "train.micro_batch",
    "train.eval_every",
    "train.num_processes",
    "train.strategy",
    "train.bucket_mb",
    "train.activation_checkpointing",
    "train.patience_s",
    "guard.limit",
    "guard.on_non_finite",  # a step with a non-finite loss is skipped in any case
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


# Keys of older versions, and their present names.
RENAMED = {"train.max_bad_steps": "guard.limit"}


def with_renamed_keys(table: Table) -> Table:
    """Returns the table of a recipe saved by an older version with renamed keys replaced."""
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
        path: TOML file; None for the defaults.
        overrides: Command-line arguments such as `["--optim.lr", "1e-4", "--model.fusion.kind=late"]`.

    Returns:
        The recipe with defaults filled in, an empty `out` replaced by `runs/<name of the file>`, and run names in
        `init_from` resolved to paths.

    Raises:
        UserError: The file is missing or not TOML, a key, kind or preset is unknown, or a value has the wrong type.

    Example:
        >>> recipe = load_recipe("launch/recipes/small.toml", ["--optim.lr", "5e-4"])
        >>> recipe.optim.lr
        0.0005
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
    """Merges a table onto the defaults and parses the result.

    Args:
        table: Tables of a recipe.
        origins: Dotted key -> file or option that set it, for error messages.
        default_origin: Origin of all other keys.

    Raises:
        UserError: A key, kind or preset is unknown, or a value has the wrong type.
    """

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
    """Yields (dotted key, raw value) for each `--key value` or `--key=value`.

    Raises:
        UserError: An argument is not a `--key`, or a key has no value.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise UserError(f'command line: unexpected "{word}"; expected --section.key VALUE')
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key} has no value; expected --{key} VALUE")
            value = rest.pop(0)
        yield key.replace("-", "_"), value


def to_table(config: Any) -> Table:
    """Returns a config as plain dicts and lists. None values are left out, because TOML has no null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value

    return clean(msgspec.to_builtins(config))


def to_toml(recipe: Recipe) -> str:
    """Returns the resolved recipe as TOML. Reading it back gives an equal recipe."""
    return tomli_w.dumps(to_table(recipe))


def show_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as TOML, with the default as a comment on each line that differs from it."""
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
    """Returns the structs of a field type: one, or one per kind; an empty list for a plain value."""
    return [part for part in getattr(node, "types", (node,)) if isinstance(part, inspect.StructType)]


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Returns the values that differ between two recipes and must not: dotted key -> (old value, new value).

    `CHANGEABLE` keys may differ. A plateau schedule depends on the evaluations, so it also fixes the interval and the
    metric of the evaluations.
    """
    before, after = dict(leaves(to_table(old))), dict(leaves(to_table(new)))
    fixed = ("train.eval_every", "saving.best") if isinstance(new.optim.schedule, Plateau) else ()
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and (key in fixed or not any(key == free or key.startswith(free + ".") for free in CHANGEABLE))
    }


def _read_toml(path: Path, origins: dict[str, str], seen: tuple[Path, ...] = ()) -> Table:
    if path.resolve() in seen:
        raise UserError(f'{path}: "base" refers back to this file')
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
            raise UserError(f"{path}: base = {base!r}: expected the name of a recipe file in the same folder")
        merged = _read_toml(path.parent / base, origins, (*seen, path.resolve()))
    for key, _ in leaves(table):
        origins[key] = str(path)
    return _overlay(merged, table)


def _overlay(under: Table, over: Table) -> Table:
    """Merges the tables of a file onto those of its base. A table with a different `kind` replaces the base table."""
    result = dict(under)
    for key, value in over.items():
        base_value = result.get(key)
        result[key] = value
        if isinstance(value, dict) and isinstance(base_value, dict):
            kind = base_value.get("kind")
            if value.get("kind", kind) == kind:
                result[key] = _overlay(base_value, value)
    return result


def _dotted_keys(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yields the dotted names of all keys of a table and of the tables in it, such as `data.manifest`."""
    for name, value in table.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _dotted_keys(value, f"{prefix}{name}.")


def _merge(node: Any, base: Any, over: Any, key: str, fail: Any) -> Any:
    """Merges `over` onto the defaults `base`, and checks keys and kinds against the type `node`."""
    if isinstance(node, inspect.Metadata):
        node = node.type
    structs = structs_of(node)
    if not structs:
        if isinstance(over, dict):  # a table with free keys, such as a tower's args
            return {**(base or {}), **{name: _typed(inspect.AnyType(), value) for name, value in over.items()}}
        return _typed(node, over)
    if not isinstance(over, dict):
        raise fail(key, f"{key} = {over!r}: expected a table [{key}]")
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
            of_kind = f' (kind "{struct.tag}")' if struct.tag_field else ""
            every = _dotted_keys(to_table(Recipe()), "")
            nested = [long for long in every if long.endswith(f".{name}")]
            near = f'; did you mean "{min(nested, key=len)}"?' if nested else did_you_mean(path, options)
            raise fail(path, f'unknown key "{path}"{of_kind}{near}')
        else:
            result[name] = _merge(fields[name], result.get(name), value, path, fail)
    return result


def _as_external(over: Table) -> Table:
    """Expands `kind = "module:attribute"` and the settings beside it to kind `external` with `factory` and `args`."""
    settings = {name: value for name, value in over.items() if name not in ("kind", "args")}
    return {"kind": "external", "factory": str(over["kind"]), "args": {**over.get("args", {}), **settings}}


def _typed(node: Any, value: Any) -> Any:
    """Parses a command-line value as TOML, unless the key holds text; returns a value from a file unchanged."""
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
    """A command-line value that has not yet been parsed by the type of its key."""


def _put(table: Table, key: str, value: str) -> None:
    """Sets a dotted key to a command-line value. A different `kind` drops the options of the previous kind."""
    *path, last = key.split(".")
    for name in path:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise UserError(f'--{key}: "{name}" is a value, not a table')
        table = inner
    if last == "kind" and table.get("kind", value) != value:
        table.clear()
    table[last] = _Word(value)


def _get(table: Any, key: str) -> Any:
    for name in key.split("."):
        table = table.get(name) if isinstance(table, dict) else None
    return table


def leaves(table: Table, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for each value in nested tables. An empty table counts as a value."""
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
    """Returns the defaults of the kinds and the preset that a recipe uses."""

    def defaults(config: Any) -> Any:
        if isinstance(config, Frontend):
            return to_table(PRESETS[config.preset])
        if not isinstance(config, Config):
            return None
        table = to_table(type(config)())
        for field in msgspec.structs.fields(config):
            value = getattr(config, field.name)
            if isinstance(value, Config):
                table[field.name] = defaults(value)
        return table

    return defaults(recipe)


def _find_runs(recipe: Recipe) -> Recipe:
    """Resolves each tower's `init_from`: a name without a folder is a run in the same folder as `out`."""
    model = recipe.model
    for modality in ("video", "audio"):
        tower = getattr(model, modality)
        if tower.init_from and Path(tower.init_from).name == tower.init_from:
            run = Path(recipe.out).parent / tower.init_from
            tower = msgspec.structs.replace(tower, init_from=str(run))
            model = msgspec.structs.replace(model, **{modality: tower})
    return msgspec.structs.replace(recipe, model=model)
