"""The recipe as it is written in YAML, and the recipe resolved against the stages that exist."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)

from phiconv.stages.stage import JSON, Stage

_WINDOWS_DEVICES = {"con", "prn", "aux", "nul"} | {
    f"{port}{digit}" for port in ("com", "lpt") for digit in range(1, 10)
}


def names_device(name: str) -> bool:
    """Whether the name of a file or folder stands for a device on Windows."""
    return name.split(".")[0].rstrip().lower() in _WINDOWS_DEVICES


def _folder_name(name: str) -> str:
    if names_device(name):
        raise ValueError(f"{name!r} cannot name a folder on Windows")
    return name


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if path == ".":
        return path
    if not parts or "\\" in path or ":" in path or path.startswith("/") or ".." in parts:
        raise ValueError("must be a relative path with forward slashes and without '..'")
    return path


class _Written(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class ModelSource(_Written):
    """The source checkpoint."""

    source: str = Field(
        min_length=1,
        description="A Hugging Face Hub id, or the path of a local checkpoint folder: relative to "
        "the current folder if it exists there, else to the recipe's folder.",
    )
    revision: str | None = Field(
        default=None, description="Commit, tag or branch of a Hub model; pin a commit."
    )


class StageEntry(_Written):
    """One stage."""

    id: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        description="The stage's name in this recipe: letters, digits, '-' and '_'.",
    )
    uses: str = Field(description="Which stage it is.")
    from_: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "minItems": 1},
                ]
            }
        ),
    ] = Field(
        default=None,
        alias="from",
        description="Ids of the stages whose artifacts it takes; by default the stage before. A "
        "stage that reads the checkpoint itself takes none.",
    )
    with_: Annotated[
        dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)
    ] = Field(default_factory=dict, alias="with", description="The stage's parameters.")


class Release(_Written):
    """Where the artifact goes in a release."""

    path: Annotated[str, AfterValidator(_inside)] = Field(
        description="Folder of the artifact in the release, as the official repository names it; "
        "'.' is the top, where GGUF files stand in official repositories."
    )


class RecipeText(_Written):
    """A recipe: from a Hugging Face checkpoint to a validated artifact."""

    schema_version: Literal[1] = Field(alias="schema", description="Version of this format.")
    name: Annotated[str, AfterValidator(_folder_name)] = Field(
        pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$",
        description="Names the output folder dist/<name>.",
    )
    model: ModelSource = Field(description="The source checkpoint.")
    stages: tuple[StageEntry, ...] = Field(min_length=1, description="What is done, in order.")
    release: Release | None = Field(
        default=None, description="Where the artifact goes in a release."
    )


@dataclass(frozen=True)
class StageUse:
    """A stage of a recipe, resolved.

    Attributes:
        id: Its name in the recipe.
        stage: What it uses.
        params: The validated `with`.
        inputs: Ids of the stages it takes, in the order of `from`.
        place: `file:line`, for errors.
    """

    id: str
    stage: Stage
    params: BaseModel
    inputs: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Recipe:
    """A checked recipe with the command line's overrides in it.

    Attributes:
        text: The recipe as written, overrides applied.
        file: The recipe's path as it was given.
        text_sha256: Digest of the file's text.
        source: What to open: a Hub id or a path that exists where `phiconv` was started.
        stages: In the recipe's order.
        warnings: What is odd but works.
        commit: The commit of a Hub model that a lock names.
    """

    text: RecipeText
    file: Path
    text_sha256: str
    source: str
    stages: tuple[StageUse, ...]
    warnings: tuple[str, ...] = ()
    commit: str | None = None

    @property
    def revision(self) -> str | None:
        """The revision of a Hub model to open."""
        return self.commit or self.text.model.revision

    @property
    def name(self) -> str:
        """Names the output folder."""
        return self.text.name

    def resolved(self) -> Mapping[str, JSON]:
        """The recipe with overrides as JSON, without paths: a local source keeps its last part."""
        data: dict[str, Any] = self.text.model_dump(mode="json", exclude_none=True)
        data["model"]["source"] = self.source_name
        for entry, use in zip(data["stages"], self.stages, strict=True):
            entry["from"] = list(use.inputs)
        return data

    @property
    def source_name(self) -> str:
        """The Hub id, or the last part of a local checkpoint's path."""
        path = Path(self.source)
        return path.resolve().name if path.exists() else self.source

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of `resolved`."""
        text = json.dumps(self.resolved(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
