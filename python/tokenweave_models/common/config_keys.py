"""A model's config.json, key by key: each value is of the kind that is asked for, or refused in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenweave_models.common.errors import UserError

LONGEST_VALUE = 80  # characters of a refused value that a message shows


class ConfigKeys:
    """The keys of a config.json, or of the section in it that ``within`` names ("rope_parameters.").

    A key that is absent or null has the value in ``defaults``, or else the one given with the question; if there is
    neither, it is missing. Every refusal is a UserError.
    """

    def __init__(self, path: Path, values: dict[str, Any], defaults: Mapping[str, Any] | None = None, within: str = ""):
        self.path, self.values, self.within = path, values, within
        self.defaults = {} if defaults is None else defaults

    def refused(self, key: str, value: Any, wanted: str) -> UserError:
        text = repr(value)
        text = text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."
        return UserError(f"{self.path}: {self.within}{key} must be {wanted}, got {text}")

    def refuse_all_but(self, accepted: Mapping[str, tuple[Any, ...]]) -> None:
        """Each of these keys is absent, null or one of the values beside it."""
        for key, values in accepted.items():
            value = self.values.get(key)
            if value is not None and value not in values:
                raise self.refused(key, value, f"{values[0]!r} or absent" if values else "absent")

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._value(key, default)
        if type(value) is not int or value < least:
            raise self.refused(key, value, f"a whole number from {least} on")
        return value

    def number(self, key: str) -> float:
        value = self._value(key, None)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.refused(key, value, "a positive number")
        return float(value)

    def switch(self, key: str) -> bool:
        value = self._value(key, False)
        if type(value) is not bool:
            raise self.refused(key, value, "true or false")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = self.defaults.get(key, default)
        if value is None:
            raise UserError(f"{self.path}: {self.within}{key} is missing")
        return value
