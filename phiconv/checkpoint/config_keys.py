"""Typed access to the keys of a config.json that collects what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phiconv.errors import CheckpointError

MAX_INTEGER = 2**31 - 1


class ConfigKeys:
    """The keys of one JSON object of a config, read by type.

    A wrong or missing value is noted in `errors` and replaced by a value of the right type, so
    that one reading finds every fault. A key that is absent or null takes its default.

    Attributes:
        errors: The faults found, shared with the sections of the same config.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        prefix: str = "",
        errors: list[CheckpointError] | None = None,
    ):
        self._values = values
        self._where = where
        self._prefix = prefix
        self.errors: list[CheckpointError] = [] if errors is None else errors

    def refuse(self, key: str, why: str, remedy: str | None = None) -> None:
        """Notes that `key` cannot be what it is."""
        self.errors.append(
            CheckpointError(f"{self._prefix}{key} {why}", where=self._where, remedy=remedy)
        )

    def section(self, key: str) -> ConfigKeys | None:
        """The object under `key`; None when it is absent, null or empty."""
        value = self._values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            self._wrong_type(key, "an object", value)
            return None
        return ConfigKeys(value, self._where, f"{self._prefix}{key}.", self.errors)

    def present(self, key: str) -> bool:
        """Whether `key` holds something other than null, false or an empty object."""
        return bool(self._values.get(key))

    def integer(
        self,
        key: str,
        default: int | None = None,
        minimum: int = 1,
        maximum: int = MAX_INTEGER,
    ) -> int:
        """An integer from `minimum` to `maximum`; required when there is no default."""
        value = self._values.get(key)
        if value is None:
            return self._default(key, default, minimum)
        if type(value) is not int:
            self._wrong_type(key, "an integer", value)
            return minimum
        if value < minimum:
            self.refuse(key, f"must be at least {minimum}, not {value}")
            return minimum
        if value > maximum:
            self.refuse(key, f"must be at most {maximum}, not {value}")
            return minimum
        return value

    def optional_integer(
        self, key: str, default: int | None = None, minimum: int = 1
    ) -> int | None:
        """An integer of at least `minimum`, None when null, `default` when absent."""
        if key not in self._values:
            return default
        return None if self._values[key] is None else self.integer(key, minimum=minimum)

    def number(self, key: str, default: float) -> float:
        """A positive, finite number."""
        value = self._values.get(key)
        if value is None:
            return default
        if not _is_positive_number(value):
            self._wrong_type(key, "a positive number", value)
            return default
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive, finite numbers; required."""
        value = self._values.get(key)
        if value is None:
            self.refuse(key, "is missing")
            return ()
        if not isinstance(value, list) or not all(_is_positive_number(item) for item in value):
            self._wrong_type(key, "a list of positive numbers", value)
            return ()
        return tuple(float(item) for item in value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self._wrong_type(key, "a string", value)
            return default
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._wrong_type(key, "true or false", value)
            return default
        return value

    def token_ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A token id or a list of them; empty when null."""
        if key not in self._values:
            return default
        value = self._values[key]
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(type(item) is int and item >= 0 for item in ids):
            self._wrong_type(key, "a token id or a list of token ids", value)
            return ()
        return tuple(ids)

    def _default(self, key: str, default: int | None, fallback: int) -> int:
        if default is None:
            self.refuse(key, "is missing")
            return fallback
        return default

    def _wrong_type(self, key: str, wanted: str, value: Any) -> None:
        shown = repr(value)
        if len(shown) > 60:
            shown = shown[:57] + "..."
        self.refuse(key, f"must be {wanted}, not {shown}")


def _is_positive_number(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    # an integer can be too large for a float
    return 0 < value <= 1.7e308 and math.isfinite(value)
