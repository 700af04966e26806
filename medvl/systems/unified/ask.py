"""A question to a model of unified: its answer, streamed."""

from collections.abc import Callable
from typing import Any

from medvl.base.tree import Tree
from medvl.language import chat, system
from medvl.systems.unified.model import Unified, make_question


def ask_image(
    model: Unified,
    params: Tree,
    image: Any,
    question: str,
    *,
    max_tokens: int = 1024,
    on_token: Callable[[str], None] | None = None,
    **options: Any,
) -> str:
    """The answer to one question about an image, by greedy decoding; for research, not for diagnosis.

    Threads may call it at once, for one model.

    Args:
        model, params: from `open_unified`, or from a run.
        image, options: as of `make_question`; None = a question about no image.
        on_token: called with each piece of the answer as soon as it is certain.
    Raises:
        ValueError: the model has no plugin to understand; as `make_question`; a question that is too long.
    """
    answering = model.task("understand")
    prompts = chat.encode_conversations(
        answering.chat, [make_question(answering.chat, image, question, **options)], prompt=True
    )
    selected = model.tasks.select(params, "understand")
    stream = None if on_token is None else lambda row, piece: on_token(piece)
    answers = chat.generate_answers(
        answering.chat,
        system.model_weights(answering, selected),
        chat.make_batch(answering.chat, prompts, [0], side="left"),
        chat.sampling_of(answering.chat, max_tokens),
        params=selected,
        on_token=stream,
    )
    return answers.texts[0].strip()
