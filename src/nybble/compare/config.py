"""Which ways to train are compared, and by what rule: laid down before the first run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from nybble.config import RunConfig
from nybble.errors import UserError, did_you_mean, listed
from nybble.files import read_yaml
from nybble.settings import Section, parse_section
from nybble.train.identity import flatten

BASE = "base"  # the model as it is: the method of an arm that is not trained
BUILT_IN = (BASE, "lora", "qlora", "full")

# All arms see the same rows; how they are put together may differ.
_SHARED = ("output", "train.seed", "data.")
_OWN = ("data.packing",)

Rate = Annotated[float, Field(gt=0)]  # as in optim.learning_rate, past which a sweep goes


class Arm(Section):
    """One way to train, as what it changes in the settings that all arms share."""

    name: str
    overrides: dict[str, Any] = Field(default={}, description="settings by dotted names, like lora.r")
    learning_rates: tuple[Rate, ...] = Field(default=(), description="to choose from; none: the comparison's")

    @classmethod
    def built_in(cls, name: str) -> Arm:
        return cls(name=name, overrides={"method": name})

    @property
    def trained(self) -> bool:
        return bool(self.overrides.get("method") != BASE)

    def config(self, shared: RunConfig) -> RunConfig:
        """The arm's settings; raises UserError for overrides that are not valid."""
        overrides = self.overrides if self.trained else self.overrides | {"method": "lora"}
        sections = shared.model_dump(mode="json", exclude_unset=True)
        try:
            return RunConfig.read(None, sections | overrides)
        except UserError as error:
            raise UserError(error.what, where=f"arm {self.name}", fix=error.fix) from None

    @model_validator(mode="after")
    def _check(self) -> Arm:
        if not re.fullmatch(r"[A-Za-z0-9][\w.=+-]*", self.name):
            raise ValueError(f"{self.name!r} cannot name an arm; use letters, digits and . _ = + -")
        shared = [name for name in self.overrides if name.startswith(_SHARED) and name not in _OWN]
        if shared:
            raise ValueError(f"arm {self.name} sets {', '.join(shared)}, which all arms share")
        return self


class CompareConfig(Section):
    arms: tuple[Arm, ...]
    seeds: int = Field(default=1, ge=1, description="runs an arm, with train.seed and those that follow it")
    learning_rates: tuple[Rate, ...] = Field(
        default=(), description="tried for every arm with the first seed; the best by validation rows is used"
    )
    reference: str | None = Field(default=None, description="what arms are held against; left out: lora, or the first")
    margin: float = Field(default=0.01, ge=0, description="nats by which an arm may be worse and still count as equal")
    test: str | None = Field(default=None, description="rows for the results: file, folder or hub dataset id")
    samples: int = Field(
        default=32, ge=0, description="test rows that every run answers, scored where the data have answers"
    )
    sample_tokens: int = Field(default=64, ge=1, description="tokens an answer, at most")
    merge: bool = Field(default=False, description="merge each arm's first adapter and measure what that costs")

    @property
    def trained(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.trained)

    @property
    def reference_name(self) -> str:
        """The arm that the others are held against; "" if none is trained."""
        names = [arm.name for arm in self.trained]
        return self.reference or ("lora" if "lora" in names else next(iter(names), ""))

    def rates_of(self, arm: Arm) -> tuple[float, ...]:
        """The learning rates to choose from for `arm`; none if there is nothing to choose."""
        rates = arm.learning_rates or self.learning_rates
        fixed = not arm.learning_rates and "optim.learning_rate" in arm.overrides
        return rates if arm.trained and not fixed else ()

    @property
    def sweeps(self) -> bool:
        return any(len(self.rates_of(arm)) > 1 for arm in self.arms)

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        names = [arm.name for arm in self.arms]
        if not names:
            raise ValueError("no arm is named")
        if len(set(names)) < len(names):
            raise ValueError(f"two arms have one name: {', '.join(names)}")
        if self.reference and self.reference not in [arm.name for arm in self.trained]:
            raise ValueError(f"reference {self.reference!r} is no arm that is trained")
        return self


def read_arms(text: str, overrides: Mapping[str, Any] | None = None) -> CompareConfig:
    """From names of built-in arms (`lora,qlora`) or a YAML file; `overrides` go over what the file says.

    The file holds the fields of `CompareConfig`; its `arms` have a section each: `{small: {method: qlora, lora.r: 4}}`.
    """
    path = Path(text).expanduser()
    values = _read_file(path) if path.suffix in (".yaml", ".yml") else {"arms": _named(text)}
    return parse_section(CompareConfig, values | dict(overrides or {}), where="--arms")


def _named(text: str) -> list[Arm]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in BUILT_IN]
    if unknown or not names:
        guess = did_you_mean(unknown[0], list(BUILT_IN)) if unknown else None
        fix = f"Did you mean {guess!r}?" if guess else f"Choose from {', '.join(BUILT_IN)}, or name a YAML file."
        raise UserError(f"no such arm: {', '.join(unknown) or '(none named)'}", where="--arms", fix=fix)
    return [Arm.built_in(name) for name in BUILT_IN if name in names]


def _read_file(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    sections = values.get("arms") if isinstance(values, dict) else None
    if not isinstance(sections, dict):
        raise UserError("must hold arms, like 'arms: {lora: {method: lora}}'", where=path)
    wrong = [str(name) for name, section in sections.items() if not isinstance(section, dict | None)]
    if wrong:
        raise UserError(listed("these arms are no sections:", wrong), where=path)
    return {**values, "arms": [_arm(str(name), section) for name, section in sections.items()]}


def _arm(name: str, section: dict[str, Any] | None) -> dict[str, Any]:
    """A section of the file: settings, nested or by dotted names, and the arm's own learning rates."""
    given = dict(section or ({"method": name} if name in BUILT_IN else {}))
    rates = given.pop("learning_rates", ())
    return {"name": name, "overrides": dict(flatten(given)), "learning_rates": rates}
