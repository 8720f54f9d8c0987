"""What the recipe's keys mean: their values, defaults and the words of the struct that reads them."""

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

_WORDS: dict[type, str] = {inspect.IntType: "whole number", inspect.FloatType: "number", inspect.StrType: "text"}
_BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


@dataclass(frozen=True)
class Key:
    """One key of the recipe.

    Attributes:
        name: Dotted, such as `optim.lr`.
        kind: Of which kind of its table it is an option; empty where that has no kinds.
        values: What may be given, in words.
        default: As TOML would have it.
        meaning: One paragraph.
    """

    name: str
    kind: str
    values: str
    default: str
    meaning: str

    def __str__(self) -> str:
        """The key with its default on one line, its values and its meaning below."""
        of = f'  (kind "{self.kind}")' if self.kind else ""
        body = textwrap.fill(f"{self.values}. {self.meaning}", 96, initial_indent="    ", subsequent_indent="    ")
        return f"{self.name} = {self.default}{of}\n{body}"


def keys() -> list[Key]:
    """All keys of a recipe, of every kind, in the order in which the structs have them."""
    return list(_below(inspect.type_info(Recipe), "", Recipe()))


def explain(asked: Sequence[str]) -> str:
    """Explains keys.

    Args:
        asked: Keys (`optim.lr`), tables (`optim`, all below it) or last words (`lr`, wherever it is); none is all.

    Raises:
        UserError: A key that no recipe has.
    """
    every = keys()
    found: list[Key] = []
    for word in asked or [""]:
        name = word.removeprefix("--").replace("-", "_")
        hits = [key for key in every if not name or key.name == name or key.name.startswith(f"{name}.")]
        hits = hits or [key for key in every if key.name.rpartition(".")[2] == name]
        if not hits:
            raise UserError(f'no recipe has a key "{word}"{did_you_mean(name, {key.name for key in every})}')
        found += [key for key in hits if key not in found]
    return "\n".join(map(str, found)) + "\n"


def _below(node: Any, place: str, default: Any) -> Iterator[Key]:
    """Yields the keys of a struct, or of each of the kinds of a union."""
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
                yield from _below(field.type, f"{name}.", value)
            else:
                yield Key(name, kind, _values(field.type), _toml(value), meanings[field.name])


def _kinds(structs: Sequence[inspect.StructType]) -> str:
    return " ".join(f"{s.tag}: {docstring_parser.parse(s.cls.__doc__ or '').short_description}" for s in structs)


def _meanings(cls: type) -> dict[str, str]:
    """What the docstrings of a struct and of those it extends say of each field."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        for entry in docstring_parser.parse(one.__doc__ or "").params:
            found[entry.arg_name] = " ".join((entry.description or "").split())
    return found


def _values(node: Any) -> str:
    """The type of a value in words."""
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
    return " ".join([_WORDS[type(node)], " and ".join(bounds)]).strip()


def _one_of(values: Any) -> str:
    return " | ".join(str(value) for value in values)


def _toml(value: Any) -> str:
    """A default as TOML writes it, which for these values is as JSON does; TOML has no word for none."""
    return "none" if value is None else json.dumps(value)
