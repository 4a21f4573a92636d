"""Sections of settings: frozen values, unknown names are errors that name the closest known one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nybble.errors import UserError, did_you_mean, listed


class Section(BaseModel):
    """Base of every group of settings. Values do not change once made; `model_copy(update=...)` makes another."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# For messages of pydantic's that speak of Python's types.
_PLAINER = {
    "string_too_short": "is empty",
    "string_type": "must be text, in quotes where YAML takes it for something else",
    "tuple_type": "must be a list, like [a, b]",
    "dict_type": "must be a section, like {name: value}",
    "model_type": "is a section with settings of its own",
}

SectionT = TypeVar("SectionT", bound=Section)


def parse_section(cls: type[SectionT], values: Mapping[str, Any], *, where: object = "settings") -> SectionT:
    """Validate `values` as a `cls`; raises one UserError that lists every problem at once."""
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        problems = [_explain(cls, problem) for problem in error.errors()]
        raise UserError(listed("settings are not valid:", problems), where=where) from None


def _explain(cls: type[BaseModel], problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = list(_section_at(cls, path[:-1]).model_fields)
        owner = ".".join(path[:-1]) or "the configuration"
        guess = _named(cls, path[-1]) or did_you_mean(path[-1], known)
        hint = f"did you mean {guess!r}?" if guess else f"it has {', '.join(known)}"
        return f"{owner} has no setting {path[-1]!r}; {hint}"
    message = _PLAINER.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if problem["type"] == "missing":
        return f"{'.'.join(path)} is required"
    # Of a section as a whole, what was given would be all of it.
    return f"{'.'.join(path)}: {message} (got {problem['input']!r})" if path else message


def _named(cls: type[BaseModel], name: str) -> str | None:
    """The setting of this very name in any section, or the one that says of itself that it is this: rank, `lora.r`."""
    for own, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if inner := _named(field.annotation, name):
                return f"{own}.{inner}"
        elif name in (own, field.description):
            return own
    return None


def _section_at(cls: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for name in path:
        field = cls.model_fields.get(name)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        cls = inner
    return cls
