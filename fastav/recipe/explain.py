"""Explains recipe keys: allowed values, default, and the meaning from the docstring of the config struct."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import docstring_parser
from msgspec import inspect

from fastav.core.errors import UserError, did_you_mean
from fastav.recipe.parse import structs_of, to_table
from fastav.recipe.schema import Recipe

_TYPE_NAMES: dict[type, str] = {inspect.IntType: "integer", inspect.FloatType: "number", inspect.StrType: "text"}
_BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


@dataclass(frozen=True)
class Key:
    """One key of the recipe.

    Attributes:
        name: Dotted name, such as `optim.lr`.
        kind: Kind of its table that has this key; empty if the table has no kinds.
        values: Allowed type and values, as text.
        default: Default value in TOML syntax.
        meaning: Description, one paragraph.
    """

    name: str
    kind: str
    values: str
    default: str
    meaning: str

    def __str__(self) -> str:
        """Returns the key and its default on one line, and its values and meaning below."""
        suffix = f'  (kind "{self.kind}")' if self.kind else ""
        body = textwrap.fill(f"{self.values}. {self.meaning}", 96, initial_indent="    ", subsequent_indent="    ")
        return f"{self.name} = {self.default}{suffix}\n{body}"


def keys() -> list[Key]:
    """Returns all keys of a recipe, including those of every kind, in the order of the struct fields."""
    return list(_keys_below(inspect.type_info(Recipe), "", Recipe()))


def explain(names: Sequence[str]) -> str:
    """Returns the explanation of keys.

    Args:
        names: Keys (`optim.lr`), tables (`optim` for all keys below it) or last parts of keys (`lr` in any table);
            empty for all keys.

    Raises:
        UserError: An unknown key.

    Example:
        >>> print(explain(["optim.lr", "sampling"]))
    """
    known = keys()
    found: list[Key] = []
    for word in names or [""]:
        name = word.removeprefix("--").replace("-", "_")
        hits = [key for key in known if not name or key.name == name or key.name.startswith(f"{name}.")]
        hits = hits or [key for key in known if key.name.rpartition(".")[2] == name]
        if not hits:
            # A key of the same name in another table is nearer than a similar name.
            same = {key.name for key in known if key.name.rpartition(".")[2] == name.rpartition(".")[2]}
            nearest = did_you_mean(name, same or {key.name for key in known})
            raise UserError(f'no recipe has a key "{word}"{nearest}')
        found += [key for key in hits if key not in found]
    return "\n".join(map(str, found)) + "\n"


def _keys_below(node: Any, place: str, default: Any) -> Iterator[Key]:
    """Yields the keys of a struct, or of every kind of a union."""
    structs = structs_of(node)
    if structs[0].tag_field:
        chosen = _toml(to_table(default)["kind"])
        yield Key(f"{place}kind", "", _one_of(s.tag for s in structs), chosen, _kinds(structs))
    for struct in structs:
        kind = str(struct.tag) if struct.tag_field else ""
        config = default if type(default) is struct.cls else struct.cls()
        meanings = _meanings(struct.cls)
        for field in struct.fields:
            name, value = place + field.name, getattr(config, field.name)
            if structs_of(field.type):
                yield from _keys_below(field.type, f"{name}.", value)
            else:
                yield Key(name, kind, _values(field.type), _toml(value), meanings[field.name])


def _kinds(structs: Sequence[inspect.StructType]) -> str:
    return " ".join(f"{s.tag}: {docstring_parser.parse(s.cls.__doc__ or '').short_description}" for s in structs)


def _meanings(cls: type) -> dict[str, str]:
    """Returns the `Attributes:` entries of a struct's docstring and of its base classes, by field name."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        for entry in docstring_parser.parse(one.__doc__ or "").params:
            found[entry.arg_name] = " ".join((entry.description or "").split())
    return found


def _values(node: Any) -> str:
    """Returns the allowed values of a type as text."""
    if isinstance(node, inspect.LiteralType):
        return _one_of(node.values)
    if isinstance(node, inspect.BoolType):
        return "true or false"
    if isinstance(node, inspect.NoneType):
        return "none"
    if isinstance(node, inspect.UnionType):
        return " or ".join(map(_values, node.types))
    if isinstance(node, inspect.TupleType):
        return f"[{', '.join(map(_values, node.item_types))}]"
    if isinstance(node, inspect.VarTupleType):
        inner = node.item_type
        tables = [f"tables of {', '.join(field.name for field in struct.fields)}" for struct in structs_of(inner)]
        return f"list of {tables[0]}" if tables else f"list, each {_values(inner)}"
    if isinstance(node, inspect.DictType):
        return "table of free keys"
    bounds = [f"{words} {getattr(node, name)}" for name, words in _BOUNDS if getattr(node, name, None) is not None]
    return " ".join([_TYPE_NAMES[type(node)], " and ".join(bounds)]).strip()


def _one_of(values: Any) -> str:
    return " | ".join(str(value) for value in values)


def _toml(value: Any) -> str:
    """Returns a default in TOML syntax, which equals JSON for these values. TOML has no null, so None is `none`."""
    return "none" if value is None else json.dumps(value)
