"""Several recipes in one go: one workspace session, one opened checkpoint for each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.errors import EnvironmentLacksError, GateError, PhiconvError, Problems, RecipeError
from phiconv.index import INDEX, check_page, write_index
from phiconv.lock import Locked, check_plans
from phiconv.plan import Plan, make_plan
from phiconv.preflight import preflight
from phiconv.progress import Display
from phiconv.publish import check_destination
from phiconv.recipe import Overrides, Recipe, load
from phiconv.report import REPORT_HTML
from phiconv.run import Built, build, open_checkpoint
from phiconv.stages.registry import STAGES
from phiconv.stages.stage import Stage
from phiconv.workspace import Workspace
from phiconv.workspace.session import open_session

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint

DIST = Path("dist")

# What went wrong first decides: a stage before the machine before a gate.
_SEVERITY = (3, 5, 4, 2, 0)


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe.

    Attributes:
        recipe: The recipe.
        built: The finished build; None when it failed.
        error: Why it failed.
    """

    recipe: Recipe
    built: Built | None
    error: PhiconvError | None

    @property
    def exit_code(self) -> int:
        """0 when the build is done and every gate passed.

        A validation that did not run never counts as passed: the machine lacks its provider.
        """
        if self.built is None:
            return self.error.exit_code if self.error else PhiconvError.exit_code
        if self.built.result.status == "failed":
            return GateError.exit_code
        if self.built.result.status == "not_run":
            return EnvironmentLacksError.exit_code
        return 0


def worst(codes: Sequence[int]) -> int:
    """The exit code that stands for several builds."""
    return next(code for code in _SEVERITY if code in codes)


def load_recipes(
    files: Sequence[Path], overrides: Overrides, registry: Mapping[str, Stage] = STAGES
) -> list[Recipe]:
    """Loads recipes; what is wrong in any of them is reported together.

    Raises:
        RecipeError: What is wrong (`Problems` for several).
    """
    recipes: list[Recipe] = []
    errors: list[PhiconvError] = []
    for file in files:
        try:
            recipe = load(file, overrides, registry)
        except Problems as problems:
            errors += problems.errors
        except PhiconvError as error:
            errors.append(error)
        else:
            errors += _same_name(recipe, recipes)
            recipes.append(recipe)
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)
    return recipes


def _same_name(recipe: Recipe, others: Sequence[Recipe]) -> list[PhiconvError]:
    return [
        RecipeError(f"two recipes have the name {recipe.name!r}", where=f"{recipe.file}")
        for other in others
        if other.name.lower() == recipe.name.lower()
    ]


def output_folders(recipes: Sequence[Recipe], out: Path | None) -> dict[str, Path]:
    """Where each recipe's output goes: `dist/<name>`, or `out` itself when there is but one."""
    if out is not None and len(recipes) == 1:
        return {recipes[0].name: out}
    return {recipe.name: (out or DIST) / recipe.name for recipe in recipes}


def index_page(recipes: Sequence[Recipe], out: Path | None) -> Path | None:
    """Where the index of several builds goes, beside their folders; one build has none."""
    return (out or DIST) / INDEX if len(recipes) > 1 else None


def _check_apart(out: Path, model: Path) -> None:
    if out.resolve() == model.resolve():
        raise RecipeError(
            "the output folder is the model's own",
            where=str(out),
            remedy="choose another folder with --out",
        )


def make_plans(
    recipes: Sequence[Recipe],
    workspace: Workspace,
    display: Display,
    registry: Mapping[str, Stage] = STAGES,
    *,
    rebuild: bool = False,
    download: bool = False,
    preload: bool = False,
    locks: Mapping[str, Locked] | None = None,
) -> list[Plan]:
    """Plans every recipe; recipes with one source share the opened checkpoint.

    Args:
        recipes: What to plan.
        workspace: Where artifacts are looked up.
        display: Where progress is shown.
        registry: The stages.
        rebuild: Treat every step as not cached.
        download: Whether models of the Hub may be downloaded.
        preload: Import what the stages need meanwhile; see `open_checkpoint`.
        locks: By recipe name: what the plans must be made of.

    Raises:
        PhiconvError: A source cannot be opened, a stage cannot work with it, or something is not
            as it was locked.
    """
    opened: dict[tuple[str, str | None], Checkpoint] = {}
    plans: list[Plan] = []
    for recipe in recipes:
        source = (recipe.source, recipe.revision)
        if source not in opened:
            opened[source] = open_checkpoint(
                recipe, workspace, display, download=download, preload=preload
            )
        plans.append(make_plan(recipe, opened[source], workspace, registry, rebuild=rebuild))
    if locks is not None:
        check_plans(plans, locks)
        for name, locked in locks.items():
            display.note(f"{name}: all as locked in {locked.file}")
    return plans


def build_all(
    recipes: Sequence[Recipe],
    workspace: Workspace,
    display: Display,
    registry: Mapping[str, Stage] = STAGES,
    *,
    out: Path | None = None,
    threads: int = 1,
    rebuild: bool = False,
    locks: Mapping[str, Locked] | None = None,
) -> list[Outcome]:
    """Builds recipes one after the other; one that fails does not stop the next.

    Several get an index page beside their folders.

    Args:
        recipes: What to build.
        workspace: Where artifacts are found and kept.
        display: Where progress is shown.
        registry: The stages.
        out: The output folder, see `output_folders`.
        threads: How many threads a stage may use.
        rebuild: Run every stage, whatever the workspace has.
        locks: By recipe name: what the builds must be made of.

    Raises:
        PhiconvError: Something is wrong that can be known before any work starts.
    """
    folders = output_folders(recipes, out)
    for folder in folders.values():
        check_destination(folder)
    page = index_page(recipes, out)
    if page is not None:
        check_page(page)
    outcomes: list[Outcome] = []
    with open_session(workspace) as session:
        plans = make_plans(
            recipes,
            workspace,
            display,
            registry,
            rebuild=rebuild,
            download=True,
            preload=True,
            locks=locks,
        )
        for plan in plans:
            _check_apart(folders[plan.recipe.name], plan.checkpoint.path)
        preflight([(plan, folders[plan.recipe.name]) for plan in plans], workspace)
        for index, plan in enumerate(plans):
            for warning in plan.warnings:
                display.note(f"warning: {warning}")
            folder = folders[plan.recipe.name]
            needed = {step.key for later in plans[index + 1 :] for step in later.steps}
            try:
                built = build(
                    plan, session, folder, threads=threads, display=display, needed=needed
                )
            except PhiconvError as error:
                outcomes.append(Outcome(plan.recipe, None, error))
            else:
                outcomes.append(Outcome(plan.recipe, built, None))
    done = [outcome.built for outcome in outcomes if outcome.built]
    if page is not None and done:
        write_index(page, {built.report / REPORT_HTML: built.result for built in done})
    return outcomes
