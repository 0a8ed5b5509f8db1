"""Dataclasses as JSON objects, with the types that their annotations say."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

_Record = TypeVar("_Record")


def _fields(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def wrong_field(record: Any) -> str | None:
    """What is wrong with the first field whose value isn't of its type, or None."""
    for name, kind in _fields(type(record)).items():
        value = getattr(record, name)
        if not _is_a(value, kind):
            return f"{name} must be {_described(kind)}, but it is {value!r}"
    return None


def to_json(record: Any) -> dict[str, Any]:
    """A dataclass as JSON's types."""
    return dataclasses.asdict(record, dict_factory=lambda pairs: {name: _plain(value) for name, value in pairs})


def from_json(kind: type[_Record], fields: dict[str, Any]) -> _Record:
    """The dataclass whose `to_json` is ``fields``; ValueError or TypeError where they aren't one's."""
    known = _fields(kind)
    if not isinstance(fields, dict) or fields.keys() != known.keys():
        wrong = sorted(set(fields) ^ known.keys()) if isinstance(fields, dict) else type(fields).__name__
        raise TypeError(f"{kind.__name__} has the fields {', '.join(known)}; {wrong} don't fit")
    record = kind(**{name: _restored(value, known[name]) for name, value in fields.items()})
    if problem := wrong_field(record):
        raise TypeError(problem)
    return record


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _restored(value: Any, kind: Any) -> Any:
    """A value with tuples, paths and dataclasses where its type has them and JSON has lists, text and objects."""
    for one in _alternatives(kind):
        if get_origin(one) is tuple and isinstance(value, list):
            element = get_args(one)[0]
            return tuple(_restored(item, element) for item in value)
        if one is Path and isinstance(value, str):
            return Path(value)
        if dataclasses.is_dataclass(one) and isinstance(one, type):
            return from_json(one, value)
    return value


def _is_a(value: Any, kind: Any) -> bool:
    if len(alternatives := _alternatives(kind)) > 1:
        return any(_is_a(value, one) for one in alternatives)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        elements = get_args(kind)
        if not isinstance(value, tuple):
            return False
        if elements[-1] is Ellipsis:
            return all(_is_a(item, elements[0]) for item in value)
        return len(value) == len(elements) and all(map(_is_a, value, elements))
    if get_origin(kind) is dict:
        key, item = get_args(kind)
        return isinstance(value, dict) and all(_is_a(one, key) and _is_a(other, item) for one, other in value.items())
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if len(alternatives := _alternatives(kind)) > 1:
        return " or ".join(map(_described, alternatives))
    if kind is types.NoneType:
        return "None"
    return str(kind) if get_origin(kind) else kind.__name__
