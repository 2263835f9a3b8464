"""The time in documents: none, unless SOURCE_DATE_EPOCH gives one (reproducible-builds.org)."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from phiconv.errors import RecipeError

VARIABLE = "SOURCE_DATE_EPOCH"


def source_date() -> str | None:
    """The time as RFC 3339 writes it, from seconds since the epoch; None where it is not set.

    Raises:
        RecipeError: It is set and no such number.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        found = datetime.fromtimestamp(int(text), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise RecipeError(
            f"{VARIABLE} is {text!r}", remedy="set it to seconds since 1970, or not at all"
        ) from error
    return found.isoformat(timespec="seconds").replace("+00:00", "Z")
