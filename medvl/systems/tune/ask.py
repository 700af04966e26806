"""A question to a run of tune."""

from pathlib import Path

from medvl.systems.system import Question
from medvl.systems.tune import run


def ask(folder: Path, question: Question) -> str:
    """The answer of a trained run to a question about some images, or about none.

    Raises:
        ValueError: as `run.ask`.
    """
    return run.ask(folder, question.text, question.images, question.max_tokens).strip()
