"""Folders of LoRA adapters, which are no checkpoints until they are merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phiconv.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"


def refuse_adapter(folder: Path) -> None:
    """Refuses a folder with an adapter that was not merged into its base model.

    Transformers applies an adapter that lies beside a checkpoint, so converting the checkpoint
    alone would be another model.

    Raises:
        CheckpointError: There is an adapter_config.json; the remedy says how to merge.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return
    config = _content(file)
    kind = str(config.get("peft_type") or "LoRA")
    base = config.get("base_model_name_or_path")
    of = f" for {base}" if isinstance(base, str) and base else ""
    raise CheckpointError(
        f"this is a {kind} adapter{of} that was not merged into its base model",
        where=str(file),
        remedy="merge it and convert the result: "
        "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(MERGED), and save the tokenizer to MERGED, too; or delete "
        f"{ADAPTER_CONFIG} and the adapter's weights if they are not wanted",
    )


def _content(file: Path) -> dict[str, Any]:
    """What it says; nothing where it cannot be read, for it is refused all the same."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
