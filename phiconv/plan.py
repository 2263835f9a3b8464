"""Recipe and checkpoint to plan: which steps there are, their cache keys, what is to be built.

Nothing is computed and nothing heavy is imported; every key is known before any work starts,
because a key is made of the keys of a step's inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel

from phiconv import machine
from phiconv.cache_key import digest, is_present, key_material
from phiconv.errors import PhiconvError, Problems, RecipeError
from phiconv.recipe.graph import in_order, optional_kinds, writer_between
from phiconv.recipe.model import Recipe, StageUse
from phiconv.stages.registry import STAGES, WRITERS
from phiconv.stages.stage import (
    JSON,
    MEASUREMENT,
    ONNX_GRAPH,
    OVERLAY,
    Estimate,
    Estimating,
    InputChecking,
    InputFitting,
    InputRef,
    Prerequisite,
    Prerequisites,
    Requirement,
    Stage,
)
from phiconv.workspace import Workspace

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint

State: TypeAlias = Literal["hit", "build", "unneeded"]


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        id: The stage's id in the recipe; `<id>.onnx`, `reference` for steps the plan added.
        stage: What it does.
        params: Its validated parameters.
        inputs: Its inputs, in the order `Stage.run` gets them.
        key: Its cache key.
        key_of: What the key is the digest of.
        path: Where its artifact is, or will be.
        place: `file:line` of the stage, for errors.
        added: Whether the plan added it.
        state: `hit`: in the workspace; `build`: to be run; `unneeded`: not there, and nothing that
            is to be run takes it.
        estimate: What it will need; None when the stage cannot say.
        missing: What it requires and this machine lacks.
    """

    id: str
    stage: Stage
    params: BaseModel
    inputs: tuple[InputRef, ...]
    key: str
    key_of: Mapping[str, JSON]
    path: Path
    place: str
    added: bool = False
    state: State = "build"
    estimate: Estimate | None = None
    missing: tuple[Requirement, ...] = ()

    @property
    def ref(self) -> InputRef:
        """This step as an input of others."""
        made_by = [item for source in self.inputs for item in source.made_by]
        made_by.append((self.stage.name, self.params))
        return InputRef(self.id, self.stage.produces, self.key, self.path, tuple(made_by))


@dataclass(frozen=True)
class Plan:
    """What a build will do.

    Attributes:
        recipe: The recipe.
        checkpoint: The opened source.
        steps: Inputs first, otherwise in the recipe's order.
        shipped: Id of the step whose artifact ships, or of what is given.
        warnings: What is odd but works.
        rebuild: Run every step, whatever the workspace has.
        given: An artifact that lies outside the workspace and is used where it is.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    steps: tuple[Step, ...]
    shipped: str
    warnings: tuple[str, ...]
    rebuild: bool
    given: InputRef | None = None

    def step(self, name: str) -> Step:
        """The step with this id."""
        return next(step for step in self.steps if step.id == name)

    @property
    def to_build(self) -> tuple[Step, ...]:
        """The steps that will run."""
        return tuple(step for step in self.steps if step.state == "build")

    @property
    def at_hand(self) -> tuple[Step, ...]:
        """The steps whose artifacts are there already or will be."""
        return tuple(step for step in self.steps if step.state != "unneeded")

    @property
    def targets(self) -> tuple[Step, ...]:
        """The steps a build is for: the shipped artifact and the measurements."""
        return tuple(
            step
            for step in self.steps
            if step.id == self.shipped or step.stage.produces == MEASUREMENT
        )

    @property
    def disk_bytes(self) -> int:
        """Estimated bytes that will be added to the workspace."""
        return sum(step.estimate.disk_bytes for step in self.to_build if step.estimate)

    @property
    def ram_bytes(self) -> int:
        """Estimated peak RAM."""
        return max((step.estimate.ram_bytes for step in self.to_build if step.estimate), default=0)

    @property
    def tools(self) -> dict[str, str]:
        """Versions of the tools that shape the bytes of any step."""
        names = sorted({name for step in self.steps for name in step.stage.tools()})
        return {name: machine.version(name) or "not installed" for name in names}


def make_plan(
    recipe: Recipe,
    checkpoint: Checkpoint,
    workspace: Workspace,
    registry: Mapping[str, Stage] = STAGES,
    *,
    rebuild: bool = False,
    given: InputRef | None = None,
) -> Plan:
    """Plans a build.

    Args:
        recipe: A checked recipe.
        checkpoint: Its opened source.
        workspace: Where artifacts are looked up.
        registry: Where the stages that the plan adds are found.
        rebuild: Treat every step as not cached.
        given: An artifact that lies outside the workspace, whose id stages may name.

    Raises:
        PhiconvError: A stage cannot work with this checkpoint (`Problems` for several).
    """
    _check(recipe, checkpoint)
    uses = {use.id: use for use in recipe.stages}
    planner = _Planner(checkpoint, workspace, registry, uses.keys(), given)
    inputs = {
        use.id: tuple(name for name in use.inputs if given is None or name != given.id)
        for use in recipe.stages
    }
    for name in in_order(list(uses), inputs):
        planner.add_use(uses[name])
    made = [use.id for use in recipe.stages if use.stage.produces != MEASUREMENT]
    shipped = planner.written(made[-1]).id if given is None else given.id
    steps = tuple(planner.steps.values())
    plan = Plan(recipe, checkpoint, steps, shipped, recipe.warnings, rebuild, given)
    return _with_states(plan, workspace)


def _check(recipe: Recipe, checkpoint: Checkpoint) -> None:
    errors: list[PhiconvError] = []
    for use in recipe.stages:
        for error in use.stage.check(use.params, checkpoint.config):
            error.where = f"{use.place} ({error.where})" if error.where else use.place
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)


class _Planner:
    """Collects steps, adding those that the recipe does not spell out."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        workspace: Workspace,
        registry: Mapping[str, Stage],
        reserved: Collection[str],
        given: InputRef | None,
    ) -> None:
        self.steps: dict[str, Step] = {}
        self._checkpoint = checkpoint
        self._workspace = workspace
        self._registry = registry
        self._reserved = reserved
        self._given = given

    def add_use(self, use: StageUse) -> None:
        """Adds a stage of the recipe, after what it needs."""
        sources: list[InputRef] = []
        for name in use.inputs:
            if self._given is not None and name == self._given.id:
                sources.append(self._given)
                continue
            kind = self.steps[name].stage.produces
            needs_writer = writer_between(kind, use.stage, self._registry) is not None
            sources.append((self.written(name) if needs_writer else self.steps[name]).ref)
        sources = self._with_overlay(use.stage, sources, use.place)
        errors: list[PhiconvError] = []
        if isinstance(use.stage, InputChecking):
            errors += use.stage.check_inputs(use.params, [source.kind for source in sources])
        if isinstance(use.stage, InputFitting):
            errors += use.stage.check_fit(use.params, self._checkpoint.config, sources)
        for error in errors:
            error.where = f"{use.place} ({error.where})" if error.where else use.place
            raise error
        if isinstance(use.stage, Prerequisites):
            needed = use.stage.prerequisites(use.params)
            sources += [self._prerequisite(item, use).ref for item in needed]
        self._add(use.id, use.stage, use.params, sources, use.place, added=False)

    def written(self, name: str) -> Step:
        """The step that writes the artifact of `name`, or that step if it ships as it is."""
        source = self.steps[name]
        writer = self._registry.get(WRITERS.get(source.stage.produces, ""))
        if writer is None:
            return source
        step_id = f"{name}.{writer.produces}"
        if step_id not in self.steps:
            sources = self._with_overlay(writer, [source.ref], source.place)
            self._add(step_id, writer, writer.params(), sources, source.place, added=True)
        return self.steps[step_id]

    def _with_overlay(self, stage: Stage, sources: list[InputRef], place: str) -> list[InputRef]:
        """The inputs, with the overlay that a graph among them was quantized with.

        A graph says how its weights are computed, not from what: whoever computes them needs the
        overlay, too.
        """
        if OVERLAY not in optional_kinds(stage):
            return sources
        behind = {ref.id: ref for ref in self._overlays_behind(sources)}
        overlays = behind | {ref.id: ref for ref in sources if ref.kind == OVERLAY}
        if len(overlays) > 1:
            raise RecipeError(
                f"two overlays for one graph: {', '.join(overlays)}",
                where=place,
                remedy="take the same overlay in every stage",
            )
        return [*sources, *(ref for ref in overlays.values() if ref not in sources)]

    def _overlays_behind(self, sources: Iterable[InputRef]) -> Iterable[InputRef]:
        for graph in sources:
            if graph.kind == ONNX_GRAPH and graph != self._given:
                inputs = self.steps[graph.id].inputs
                yield from (ref for ref in inputs if ref.kind == OVERLAY)
                yield from self._overlays_behind(inputs)

    def _prerequisite(self, item: Prerequisite, use: StageUse) -> Step:
        stage = self._registry[item.uses]
        params = stage.params.model_validate(dict(item.params))
        step = self._make(item.id, stage, params, [], use.place, added=True)
        known = self.steps.get(item.id)
        if item.id in self._reserved or (known is not None and known.key != step.key):
            step = replace(step, id=f"{use.id}.{item.id}")
        return self.steps.setdefault(step.id, step)

    def _add(
        self,
        step_id: str,
        stage: Stage,
        params: BaseModel,
        sources: Sequence[InputRef],
        place: str,
        *,
        added: bool,
    ) -> None:
        self.steps[step_id] = self._make(step_id, stage, params, sources, place, added=added)

    def _make(
        self,
        step_id: str,
        stage: Stage,
        params: BaseModel,
        sources: Sequence[InputRef],
        place: str,
        *,
        added: bool,
    ) -> Step:
        requirements = stage.requires(params)
        missing = tuple(item for item in requirements if not is_present(item))
        inputs = tuple(sources)
        material = key_material(stage, params, inputs, self._checkpoint.digest)
        key = digest(material)
        path = self._workspace.artifact_path(stage.produces, key)
        estimate = None
        if isinstance(stage, Estimating):
            estimate = stage.estimate(params, self._checkpoint.config, inputs)
        return Step(
            step_id,
            stage,
            params,
            inputs,
            key,
            material,
            path,
            place,
            added=added,
            estimate=estimate,
            missing=missing,
        )


def _with_states(plan: Plan, workspace: Workspace) -> Plan:
    cached = {
        step.id
        for step in plan.steps
        if not plan.rebuild and workspace.lookup(step.stage.produces, step.key)
    }
    needed: set[str] = set()

    def visit(step: Step) -> None:
        if step.id not in needed:
            needed.add(step.id)
            for source in step.inputs if step.id not in cached else ():
                if source != plan.given:
                    visit(plan.step(source.id))

    for target in plan.targets:
        visit(target)

    def state(step: Step) -> State:
        if step.id in cached:
            return "hit"
        return "build" if step.id in needed else "unneeded"

    return replace(plan, steps=tuple(replace(step, state=state(step)) for step in plan.steps))


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as data, for `phiconv plan --json`."""
    return {
        "recipe": plan.recipe.name,
        "checkpoint": {"source": plan.checkpoint.source, "digest": plan.checkpoint.digest},
        "shipped": plan.shipped,
        "disk_bytes": plan.disk_bytes,
        "ram_bytes": plan.ram_bytes,
        "warnings": list(plan.warnings),
        "steps": [
            {
                "id": step.id,
                "uses": step.stage.name,
                "state": step.state,
                "key": step.key,
                "key_of": step.key_of,
                "inputs": [source.id for source in step.inputs],
                "missing": [item.name for item in step.missing],
                "disk_bytes": step.estimate.disk_bytes if step.estimate else None,
                "ram_bytes": step.estimate.ram_bytes if step.estimate else None,
            }
            for step in plan.steps
        ],
    }
