"""Lock files: what a build is made of, written down, and whether it is still so.

A recipe names a model, texts and files; a lock says which bytes they were: the model's commit and
the digest of each of its files, the digests of texts and files that parameters name, the versions
of phiconv, of its stages and of the tools that shape the bytes, and the cache keys that follow.
It lies beside its recipe as `<recipe>.lock.json`.

Which execution providers the machine has is no part of a lock: it shapes no artifact, the recipe
says what happens where one is missing, and the report says where it was measured.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from phiconv import __version__, machine
from phiconv.errors import EnvironmentLacksError, PhiconvError, Problems, RecipeError
from phiconv.plan import Plan, Step
from phiconv.recipe import Overrides, Recipe
from phiconv.recipe.model import RecipeText
from phiconv.stages.registry import STAGES
from phiconv.stages.stage import JSON, MEASUREMENT
from phiconv.workspace.disk import rename_over

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint

SUFFIX = ".lock.json"

KeyPath: TypeAlias = tuple[str, ...]

_SHOWN = 60  # characters of a value that a difference repeats
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


class _Written(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LockedCheckpoint(_Written):
    """The source: its Hub id or folder name, its commit on the Hub, its files' digests."""

    source: str
    revision: str | None
    files: dict[str, str]


class LockedStep(_Written):
    """A step of the plan.

    Attributes:
        uses: Its stage.
        version: The stage's version.
        params: What of its parameters shapes the output, files by digest; None for a measurement,
            which depends on the machine, too, and whose parameters stand in the recipe.
        inputs: Ids of the steps it takes.
        key: Its cache key; None for a measurement.
    """

    uses: str
    version: int
    params: dict[str, Any] | None
    inputs: list[str]
    key: str | None


class Lock(_Written):
    """What a build is made of.

    Attributes:
        lock_version: The version of this format.
        phiconv: The version of phiconv.
        recipe: The recipe with what the command line replaced.
        checkpoint: The source.
        tools: Versions of the distributions that shape the bytes of any step.
        steps: By id.
    """

    lock_version: Literal[1] = Field(alias="lock")
    phiconv: str
    recipe: dict[str, Any]
    checkpoint: LockedCheckpoint
    tools: dict[str, str]
    steps: dict[str, LockedStep]

    @field_validator("recipe")
    @classmethod
    def _is_recipe(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        RecipeText.model_validate(recipe)
        return recipe

    @classmethod
    def of(cls, plan: Plan) -> Lock:
        """What a plan is made of."""
        return cls(
            lock=1,
            phiconv=__version__,
            recipe=dict(plan.recipe.resolved()),
            checkpoint=_checkpoint(plan.recipe, plan.checkpoint),
            tools=plan.tools,
            steps={step.id: _step(step) for step in plan.steps},
        )

    def text(self) -> str:
        """The file's content: the same for the same build, one value a line."""
        document = self.model_dump(mode="json", by_alias=True)
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _checkpoint(recipe: Recipe, checkpoint: Checkpoint) -> LockedCheckpoint:
    return LockedCheckpoint(
        source=recipe.source_name, revision=checkpoint.revision, files=checkpoint.digests
    )


def _step(step: Step) -> LockedStep:
    measures = step.stage.produces == MEASUREMENT
    params = {**step.stage.key_params(step.params)}
    if "present" in step.key_of:
        params["present"] = step.key_of["present"]
    return LockedStep(
        uses=step.stage.name,
        version=step.stage.version,
        params=None if measures else params,
        inputs=[source.id for source in step.inputs],
        key=None if measures else step.key,
    )


@dataclass(frozen=True)
class Difference:
    """One value that is not as it was.

    Attributes:
        path: Where it stands in the lock.
        before, now: Both values; None where there is none.
    """

    path: KeyPath
    before: JSON
    now: JSON

    @property
    def name(self) -> str:
        """The path as a dotted key."""
        return ".".join(self.path)

    def sides(self) -> tuple[str, str]:
        """Both values in short."""
        return _short(self.before), _short(self.now)


def _short(value: JSON) -> str:
    if value is None:
        return "absent"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _DIGEST.sub(lambda found: found[0][:12], text)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def lock_file(recipe: Recipe) -> Path:
    """Where a recipe's lock lies.

    Its name ends in .json, so that a pattern over recipes (`*.yaml`) finds no locks.
    """
    return recipe.file.with_name(recipe.file.stem + SUFFIX)


def read_lock(file: Path) -> Lock:
    """Reads a lock file.

    Raises:
        RecipeError: There is none, or it is not one of this format.
    """
    remedy = "make it with `phiconv lock`"
    try:
        return Lock.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise RecipeError(f"there is no lock file {file}", remedy=remedy) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = f"not a lock file of this format: {place + ': ' if place else ''}{first['msg']}"
        raise RecipeError(message, where=str(file), remedy=remedy) from error


def write_lock(plan: Plan) -> tuple[Path, list[Difference] | None]:
    """Writes the lock of a plan beside its recipe.

    Returns:
        The file, and how it differs from what was there; None when there was no lock.

    Raises:
        RecipeError: It cannot be written.
    """
    file, lock = lock_file(plan.recipe), Lock.of(plan)
    before = None
    with suppress(RecipeError):
        before = read_lock(file)
    if before != lock:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            temporary.write_text(lock.text(), encoding="utf-8", newline="\n")
            rename_over(temporary, file)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise RecipeError(f"cannot be written: {error.strerror}", where=str(file)) from error
    return file, None if before is None else list(differences(before, lock))


def differences(before: Lock, now: Lock) -> Iterator[Difference]:
    """Everything in which two locks differ, in the order of their sections."""
    yield from _diff(before.phiconv, now.phiconv, ("phiconv",))
    yield from _diff(before.tools, now.tools, ("tools",))
    yield from _diff(_by_id(before.recipe), _by_id(now.recipe), ("recipe",))
    yield from _diff(before.checkpoint.model_dump(), now.checkpoint.model_dump(), ("checkpoint",))
    yield from _diff(_dumped(before.steps), _dumped(now.steps), ("steps",))


def _diff(before: Any, now: Any, path: KeyPath) -> Iterator[Difference]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            yield from _diff(before.get(key), now.get(key), (*path, key))
    elif before != now:
        yield Difference(path, before, now)


def _dumped(steps: Mapping[str, LockedStep]) -> dict[str, Any]:
    return {name: step.model_dump() for name, step in steps.items()}


def _by_id(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe with its stages by id, so that one put between names no others."""
    stages = {entry["id"]: entry for entry in recipe["stages"]}
    return {**recipe, "stages": stages, "order": list(stages)}


@dataclass(frozen=True)
class Locked:
    """A recipe's lock, held against what is there.

    Attributes:
        file: Where the lock lies.
        recipe_file: Where the recipe lies.
        lock: What is in it.
        overrides: What the command line changes in the recipe.
    """

    file: Path
    recipe_file: Path
    lock: Lock
    overrides: Overrides

    def check_recipe(self, recipe: Recipe) -> list[PhiconvError]:
        """What differs as far as it can be told without the model, so before a download."""
        here = {name: machine.version(name) or "not installed" for name in self.lock.tools}
        revision, locked = self.overrides.revision, self.lock.checkpoint.revision
        recipes = (self._locked_recipe(), self._comparable(recipe.resolved()))
        errors = self._errors(_diff(*recipes, ("recipe",)))
        if self.overrides.model is None and revision not in (None, locked):
            found = Difference(("checkpoint", "revision"), locked, revision)
            errors += self._errors([found])
        errors += self._errors(_diff(self.lock.phiconv, __version__, ("phiconv",)))
        return errors + self._errors(_diff(self.lock.tools, here, ("tools",)))

    def check_plan(self, plan: Plan) -> list[PhiconvError]:
        """What differs in the model, the texts and files, the stages."""
        now = Lock.of(plan)
        before, checkpoint = self.lock.steps, self.lock.checkpoint
        if self.overrides.skip_validation:
            before = {name: step for name, step in before.items() if name in now.steps}
        found = [*_diff(checkpoint.files, now.checkpoint.files, ("checkpoint", "files"))]
        if self.overrides.model is None:
            for name in ("source", "revision"):
                was, is_now = getattr(checkpoint, name), getattr(now.checkpoint, name)
                found += _diff(was, is_now, ("checkpoint", name))
        steps = list(_diff(_dumped(before), _dumped(now.steps), ("steps",)))
        # A key differs because of something else that does, which has a name of its own.
        causes = [item for item in steps if item.path[-1] != "key"]
        found += causes if causes or found else steps
        tools = {**self.lock.tools, **now.tools}
        return self._errors([*found, *_diff(self.lock.tools, tools, ("tools",))])

    def pinned(self, recipe: Recipe) -> Recipe:
        """The recipe at the locked commit, where it takes its model from where the lock does."""
        here = recipe.source == self.lock.checkpoint.source and not Path(recipe.source).exists()
        return replace(recipe, commit=self.lock.checkpoint.revision) if here else recipe

    def _locked_recipe(self) -> dict[str, Any]:
        """The locked recipe, as far as it is compared."""
        recipe = dict(self.lock.recipe)
        if self.overrides.skip_validation:
            recipe["stages"] = [entry for entry in recipe["stages"] if not _measures(entry)]
        return self._comparable(recipe)

    def _comparable(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Leaves out what the command line replaced: the digests and the commit decide there."""
        model = dict(recipe["model"])
        if self.overrides.model is not None:
            model.pop("source", None)
        if self.overrides.model is not None or self.overrides.revision is not None:
            model.pop("revision", None)
        return _by_id({**recipe, "model": model})

    def _errors(self, found: Iterable[Difference]) -> list[PhiconvError]:
        return [self._error(item) for item in found]

    def _error(self, difference: Difference) -> PhiconvError:
        locked, here = difference.sides()
        message = f"{difference.name}: locked is {locked}, here is {here}"
        section = difference.path[0]
        again = f"or lock again: phiconv lock {self.recipe_file}"
        if section in ("phiconv", "tools"):
            name = difference.path[-1]
            remedy = f"install {name} {locked}, {again}"
            return EnvironmentLacksError(message, where=str(self.file), remedy=remedy)
        if section == "recipe":
            undo = "undo the change, in the recipe or on the command line"
        elif section == "checkpoint":
            undo = "use the model that was locked"
        elif "params" in difference.path:
            undo = "put back the texts or files that were locked"
        else:
            undo = "use the phiconv that it was locked with"
        return RecipeError(message, where=str(self.file), remedy=f"{undo}, {again}")


def _measures(entry: Mapping[str, Any]) -> bool:
    stage = STAGES.get(entry["uses"])
    return stage is not None and stage.produces == MEASUREMENT


def open_locks(
    recipes: Sequence[Recipe], overrides: Overrides
) -> tuple[list[Recipe], dict[str, Locked]]:
    """Reads the locks of recipes and finds what differs before anything is downloaded.

    Args:
        recipes: The recipes, with the overrides in them.
        overrides: What the command line changed in them.

    Returns:
        The recipes, each at its locked commit, and their locks by recipe name.

    Raises:
        PhiconvError: A lock is missing or malformed, or the recipe, phiconv or a tool is not as
            it was locked (`Problems` for several).
    """
    locks: dict[str, Locked] = {}
    errors: list[PhiconvError] = []
    for recipe in recipes:
        file = lock_file(recipe)
        try:
            locks[recipe.name] = Locked(file, recipe.file, read_lock(file), overrides)
        except RecipeError as error:
            errors.append(error)
        else:
            errors += locks[recipe.name].check_recipe(recipe)
    _raise(errors)
    return [locks[recipe.name].pinned(recipe) for recipe in recipes], locks


def check_plans(plans: Sequence[Plan], locks: Mapping[str, Locked]) -> None:
    """Makes sure that plans are made of what their locks say.

    Raises:
        PhiconvError: What differs (`Problems` for several).
    """
    _raise([error for plan in plans for error in locks[plan.recipe.name].check_plan(plan)])


def _raise(errors: Sequence[PhiconvError]) -> None:
    """What another machine could do goes last: the first error's code is the exit code."""
    found = sorted(errors, key=lambda error: isinstance(error, EnvironmentLacksError))
    if found:
        raise found[0] if len(found) == 1 else Problems(found)
