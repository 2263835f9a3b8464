"""A reference on disk: final hidden states of a token set, from which any logits follow.

`hidden.npy` (float32 [n, T, hidden]) is a tenth of the logits and lossless: the head gives them
back. `tokens.npy` (int64 [n, T]) and `reference.json` say of what.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.errors import StageError
from phiconv.report.results import TokenSetRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.tokens import TokenSet

HIDDEN_FILE = "hidden.npy"
TOKENS_FILE = "tokens.npy"
METADATA_FILE = "reference.json"


@dataclass(frozen=True)
class StoredReference:
    """A reference as it is read back.

    Attributes:
        hidden: Hidden states after the final norm, float32 [n, T, hidden].
        windows: Token ids, int64 [n, T].
        tokens: The token set's name and digests.
        device: Where it was computed, `cpu` or `cuda`.
        versions: Versions of what computed it.
    """

    hidden: NDArray[np.float32]
    windows: NDArray[np.int64]
    tokens: TokenSetRecord
    device: str
    versions: Mapping[str, str]


def token_set_record(token_set: TokenSet) -> TokenSetRecord:
    """What reports keep of a token set."""
    windows, length = token_set.windows.shape
    return TokenSetRecord(
        name=token_set.name,
        windows=windows,
        window_length=length,
        text_digest=token_set.text_digest,
        ids_digest=token_set.ids_digest,
        sources=token_set.sources,
    )


def save_reference(
    folder: Path,
    hidden: NDArray[np.float32],
    token_set: TokenSet,
    *,
    device: str,
    versions: Mapping[str, str],
) -> None:
    """Writes a reference into an empty folder; equal arguments give equal bytes."""
    import numpy as np

    metadata = {
        "tokens": dataclasses.asdict(token_set_record(token_set)),
        "device": device,
        "versions": dict(versions),
    }
    np.save(folder / HIDDEN_FILE, hidden, allow_pickle=False)
    np.save(folder / TOKENS_FILE, token_set.windows, allow_pickle=False)
    text = json.dumps(metadata, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / METADATA_FILE).write_text(text, encoding="utf-8", newline="\n")


def load_reference(folder: Path) -> StoredReference:
    """Reads a reference back.

    Raises:
        StageError: A file is missing or is not what `save_reference` wrote.
    """
    import numpy as np

    try:
        metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        tokens = metadata["tokens"]
        return StoredReference(
            hidden=np.load(folder / HIDDEN_FILE, allow_pickle=False),
            windows=np.load(folder / TOKENS_FILE, allow_pickle=False),
            tokens=TokenSetRecord(**{**tokens, "sources": tuple(tokens["sources"])}),
            device=metadata["device"],
            versions=metadata["versions"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"not a reference: {error!r}", where=str(folder)) from error
