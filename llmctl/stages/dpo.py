"""`llmctl dpo`: let a model prefer the chosen answers."""

from __future__ import annotations

from llmctl.recipe.tune import DpoRecipe
from llmctl.runs import RunResult
from llmctl.stages.preference import train_on_pairs
from llmctl.talk import Talk


def run(
    recipe: DpoRecipe, talk: Talk, *, resume: bool = False, resume_with: bool = False, dry_run: bool = False
) -> RunResult:
    """Train by direct preference optimization; the model as it began is the reference.

    Raises as `train_on_pairs`.
    """
    return train_on_pairs(recipe, talk, resume=resume, resume_with=resume_with, dry_run=dry_run)
