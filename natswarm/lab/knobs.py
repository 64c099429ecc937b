"""Knobs of a NAT as text: `hairpinning=yes`, `allocation=uniform:low=2000,high=3000`.

The knobs are the fields of `NatBehaviour` (`docs/emulator.md`), so that a new one is settable
without a word here. Pure.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Sequence
from typing import Any

from natswarm.errors import ConfigurationError
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.ports import Blocks, Preserving, ScaledBeta, Sequential, Uniform

__all__ = ["with_knobs"]

_LAWS: dict[str, type[Any]] = {
    "preserving": Preserving,
    "uniform": Uniform,
    "scaled-beta": ScaledBeta,
    "sequential": Sequential,
    "blocks": Blocks,
}
_BOOLEANS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


def with_knobs(behaviour: NatBehaviour, knobs: Sequence[tuple[str, str]]) -> NatBehaviour:
    """Return a behaviour with some knobs turned, all at once.

    Args:
        behaviour: What it is without.
        knobs: Names and values as text.

    Raises:
        ConfigurationError: There is no such knob, a value is not one of it, a knob is turned twice,
            or the knobs contradict each other; says which.
    """
    types_by_name = typing.get_type_hints(NatBehaviour)
    values: dict[str, Any] = {}
    for name, text in knobs:
        if name not in types_by_name:
            names = ", ".join(types_by_name)
            raise ConfigurationError(f"there is no knob {name!r}; there are {names}")
        if name in values:
            raise ConfigurationError(f"{name} is set twice; set it once")
        values[name] = _value(name, types_by_name[name], text)
    try:
        return dataclasses.replace(behaviour, **values)
    except ValueError as error:
        raise ConfigurationError(f"{_text(knobs)} cannot be: {error}") from error


def _value(name: str, kind: Any, text: str) -> Any:
    """Return the value of type `kind` that a text means."""
    if name == "allocation":
        return _law(text)
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in choices:
        if text.lower() == "none":
            return None
        (kind,) = (choice for choice in choices if choice is not types.NoneType)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _member(name, kind, text)
    if dataclasses.is_dataclass(kind):
        return _make(f"{name}={text}", kind, text)
    if typing.get_origin(kind) is tuple:
        low, dots, high = text.partition("..")
        if not dots:
            raise ConfigurationError(f"{name} takes bounds such as 48..75, not {text!r}")
        return _scalar(name, float, low), _scalar(name, float, high)
    return _scalar(name, kind, text)


def _law(text: str) -> Any:
    word, _, parameters = text.partition(":")
    if word not in _LAWS:
        raise ConfigurationError(
            f"there is no law of allocation {word!r}; there are {', '.join(_LAWS)}, with "
            "parameters as in uniform:low=2000,high=3000"
        )
    return _make(f"allocation={text}", _LAWS[word], parameters)


def _make(title: str, kind: Any, text: str) -> Any:
    """Return a dataclass out of `name=value,name=value`."""
    hints = typing.get_type_hints(kind)
    fields = {each.name: hints[each.name] for each in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for item in text.split(",") if text else ():
        name, equals, value = item.partition("=")
        if not equals or name not in fields or name in values:
            raise ConfigurationError(
                f"{title}: {item!r} is not one of {', '.join(f'{each}=' for each in fields)} "
                "(each once, separated by commas)"
            )
        values[name] = _value(name, fields[name], value)
    try:
        return kind(**values)
    except TypeError:
        raise ConfigurationError(
            f"{title} lacks parameters: it takes {', '.join(f'{each}=' for each in fields)}"
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{title} cannot be: {error}") from error


def _member(name: str, kind: type[enum.Enum], text: str) -> enum.Enum:
    members = {member.name.lower().replace("_", "-"): member for member in kind}
    word = text.lower().replace("_", "-").replace(" ", "-")
    if word not in members:
        raise ConfigurationError(f"{name} is one of {', '.join(members)}, not {text!r}")
    return members[word]


def _scalar(name: str, kind: Any, text: str) -> Any:
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ConfigurationError(f"{name} is yes or no, not {text!r}")
        return _BOOLEANS[text.lower()]
    try:
        return kind(text)
    except ValueError:
        word = "a whole number" if kind is int else "a number"
        raise ConfigurationError(f"{name} takes {word}, not {text!r}") from None


def _text(knobs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name}={value}" for name, value in knobs) or "that"
