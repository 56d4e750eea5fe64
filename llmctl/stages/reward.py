"""`llmctl reward`: make a model that scores answers, from preferences."""

from __future__ import annotations

from llmctl.recipe.tune import RewardRecipe
from llmctl.runs import RunResult
from llmctl.stages.preference import train_on_pairs
from llmctl.talk import Talk


def run(
    recipe: RewardRecipe,
    talk: Talk,
    *,
    resume: bool = False,
    resume_with: bool = False,
    dry_run: bool = False,
) -> RunResult:
    """Train a score head, and the model below it, to score chosen answers above rejected ones.

    Raises as `train_on_pairs`.
    """
    return train_on_pairs(recipe, talk, resume=resume, resume_with=resume_with, dry_run=dry_run)
