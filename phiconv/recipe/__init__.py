"""Recipes: YAML in, a checked `Recipe` out."""

from __future__ import annotations

from phiconv.recipe.model import Recipe, StageUse
from phiconv.recipe.overrides import Overrides
from phiconv.recipe.resolve import load

__all__ = ["Overrides", "Recipe", "StageUse", "load"]
