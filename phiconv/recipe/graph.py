"""How a recipe's stages hang together: who takes whose artifact, and whether that can work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phiconv.errors import PhiconvError, RecipeError
from phiconv.recipe.keys import did_you_mean
from phiconv.stages.registry import WRITERS
from phiconv.stages.stage import MEASUREMENT, OptionalInputs, Stage


@dataclass(frozen=True)
class Node:
    """A stage as far as connecting it needs.

    `stage` is None where `uses` names none; `sources` is None where `from` is not given.
    """

    id: str
    stage: Stage | None
    sources: tuple[str, ...] | None
    place: str


def writer_between(kind: str, stage: Stage, registry: Mapping[str, Stage]) -> Stage | None:
    """The stage to put between an artifact of `kind` and a `stage` that takes it written."""
    writer = registry.get(WRITERS.get(kind, ""))
    return writer if writer is not None and writer.produces in stage.accepts else None


def optional_kinds(stage: Stage) -> tuple[str, ...]:
    """Kinds of the inputs that a stage takes but can do without."""
    return stage.accepts_also if isinstance(stage, OptionalInputs) else ()


def connect(
    nodes: Sequence[Node], registry: Mapping[str, Stage]
) -> tuple[dict[str, tuple[str, ...]], list[PhiconvError], list[str]]:
    """Finds each stage's inputs.

    Returns:
        Input ids by stage id, everything that is wrong, and warnings.
    """
    errors: list[PhiconvError] = []
    by_id: dict[str, Node] = {}
    for node in nodes:
        if node.id in by_id:
            first = by_id[node.id].place
            errors.append(
                RecipeError(
                    f"two stages have the id {node.id!r} (first at {first})", where=node.place
                )
            )
        else:
            by_id[node.id] = node
    inputs: dict[str, tuple[str, ...]] = {}
    for index, node in enumerate(nodes):
        before = nodes[index - 1].id if index else None
        found, problems = _inputs(node, before, by_id, registry)
        inputs.setdefault(node.id, found)
        errors += problems
    errors += _cycles(by_id, inputs)
    shipped = shipped_id(nodes)
    if shipped is None and nodes:  # without any the schema has complained
        errors.append(
            RecipeError(
                "the recipe makes no artifact", remedy="add a stage that is not a validation"
            )
        )
    used = {source for sources in inputs.values() for source in sources} | {shipped}
    warnings = [
        f"{node.place}: nothing takes the output of stage {node.id!r}"
        for node in nodes
        if node.id not in used and _ships(node)
    ]
    return inputs, errors, warnings


def shipped_id(nodes: Sequence[Node]) -> str | None:
    """The stage whose (written) output ships: the last one that is not a validation."""
    made = [node.id for node in nodes if _ships(node)]
    return made[-1] if made else None


def _ships(node: Node) -> bool:
    return node.stage is None or node.stage.produces != MEASUREMENT


def _inputs(
    node: Node, before: str | None, by_id: Mapping[str, Node], registry: Mapping[str, Stage]
) -> tuple[tuple[str, ...], list[PhiconvError]]:
    sources = node.sources if node.sources is not None else (before,) if before else ()
    known = tuple(source for source in sources if source in by_id)
    errors: list[PhiconvError] = [
        _error(node, f"takes unknown stage {source!r}", did_you_mean(source, by_id))
        for source in sources
        if source not in by_id
    ]
    if node.stage is None:
        return known, errors
    if not node.stage.accepts and not (node.sources and optional_kinds(node.stage)):
        if node.sources:
            errors = [_error(node, "reads the checkpoint itself", "take its `from` away")]
        return (), errors
    if not sources:
        accepts = " or ".join(node.stage.accepts)
        return (), [_error(node, f"needs an input of kind {accepts}", "name it with `from`")]
    return known, errors + _mismatches(node, node.stage, [by_id[name] for name in known], registry)


def _mismatches(
    node: Node, stage: Stage, sources: Sequence[Node], registry: Mapping[str, Stage]
) -> list[PhiconvError]:
    errors: list[PhiconvError] = []
    kinds: list[str] = []
    accepted = (*stage.accepts, *optional_kinds(stage))
    for source in sources:
        if source.stage is None:
            continue
        kind = source.stage.produces
        writer = writer_between(kind, stage, registry)
        kinds.append(writer.produces if writer else kind)
        if kinds[-1] not in accepted:
            accepts = " or ".join(accepted)
            message = f"takes {accepts}, but stage {source.id!r} ({source.stage.name}) makes {kind}"
            errors.append(_error(node, message, "name the right stage with `from`"))
    lacks = stage.accepts and not set(kinds) & set(stage.accepts)
    if lacks and kinds and not errors:
        accepts = " or ".join(stage.accepts)
        message = f"needs an input of kind {accepts} besides {', '.join(kinds)}"
        errors.append(_error(node, message, "name it with `from`, too"))
    if len(set(kinds)) < len(kinds):
        errors.append(_error(node, f"takes two inputs of one kind: {', '.join(kinds)}", None))
    return errors


def _error(node: Node, message: str, remedy: str | None) -> PhiconvError:
    uses = f" ({node.stage.name})" if node.stage else ""
    return RecipeError(f"stage {node.id!r}{uses} {message}", where=node.place, remedy=remedy)


def _cycles(by_id: Mapping[str, Node], inputs: Mapping[str, tuple[str, ...]]) -> list[PhiconvError]:
    waiting = {name: set(inputs.get(name, ())) for name in by_id}
    while ready := [name for name, sources in waiting.items() if not sources & waiting.keys()]:
        for name in ready:
            del waiting[name]
    # What is left is on a cycle or behind one; take away what nothing left waits for.
    while ends := [name for name in waiting if not any(name in s for s in waiting.values())]:
        for name in ends:
            del waiting[name]
    if not waiting:
        return []
    names = ", ".join(repr(name) for name in waiting)
    place = by_id[next(iter(waiting))].place
    return [RecipeError(f"stages take each other's output in a circle: {names}", where=place)]


def in_order(ids: Sequence[str], inputs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Sorts stages so that inputs come first, otherwise keeping the recipe's order."""
    done: list[str] = []

    def visit(name: str) -> None:
        if name not in done:
            for source in inputs[name]:
                visit(source)
            done.append(name)

    for name in ids:
        visit(name)
    return done
