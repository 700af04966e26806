"""Pictures from texts and images: the language model writes the codes of a picture, the VQ model decodes them.

Only codes may come, as many as a picture has, and then the end: no text is ever parsed.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from medvl.base import files
from medvl.base.files import PathLike
from medvl.base.progress import run_batches
from medvl.base.text import few
from medvl.base.tree import Tree
from medvl.components import vq
from medvl.language import chat, encoding, sampling, system
from medvl.language.chat import Encoded
from medvl.language.conversations import Conversation
from medvl.language.encoding import IGNORE, Sample
from medvl.language.sampling import Sampling
from medvl.systems.unified.model import Unified, make_question, picture_shape

_log = logging.getLogger("medvl")


def draw_image(
    model: Unified,
    params: Tree,
    image: Any,
    text: str,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    on_code: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Image.Image:
    """The picture that a text asks for; for research, not for diagnosis.

    Threads may call it at once, for one model.

    Args:
        model, params: from `open_unified`, or from a run.
        image, options: as of `make_question`; None = a picture from the text alone.
        temperature: codes are drawn at it by `seed`; 0 = the likeliest code each time.
        on_code: called with (codes that are written, codes of a picture).
    Raises:
        ValueError: the model has no plugin to draw; as `make_question`; a text that is too long.
    """
    question = make_question(model.task("draw").chat, image, text, **options)
    prompts = encode_drawings(model, [question])
    codes = draw_codes(model, params, prompts, [0], temperature=temperature, seed=seed, on_code=on_code)
    return Image.fromarray(decode_pictures(model, codes)[0])


def encode_drawings(
    model: Unified, questions: Sequence[Conversation], pictures: Sequence[Sequence[int]] | None = None
) -> Encoded:
    """Token ids of questions and <start_index>; with `pictures`, the codes of each follow, to be trained on.

    Those longer than the context are left out and counted, where they are trained.

    Raises:
        ValueError: as `chat.encode_conversations`; none fits the context.
    """
    opened, codes = model.task("draw").chat, model.codes
    assert codes is not None
    ends = encoding.end_ids(opened.tokenizer, chat.conversation_format(opened.cfg))
    prompts = chat.encode_conversations(opened, questions, prompt=True)
    samples, fitting = list[Sample](), list[Conversation]()
    for i, prompt in enumerate(prompts.samples):
        answer = [codes.start]
        if pictures is not None:
            answer += [*(codes.first + code for code in pictures[i]), codes.end, *ends]
        start, stop = len(prompt.ids), len(prompt.ids) + len(answer)
        if pictures is not None and stop > opened.cfg.context:
            continue
        ids = torch.cat([prompt.ids, torch.tensor(answer)])
        labels = torch.full_like(ids, IGNORE)
        if pictures is not None:
            labels[start:] = ids[start:]
        samples.append(Sample(ids=ids, labels=labels, trained=((start, stop),), visual=prompt.visual))
        fitting.append(questions[i])
    refused = len(questions) - len(fitting)
    if refused:
        message = (
            f"{refused} of {len(questions)} drawings do not fit the context of {opened.cfg.context} tokens"
        )
        if not fitting:
            raise ValueError(f"{message}; raise chat.context")
        _log.warning("%s and are left out", message)
    return Encoded(conversations=tuple(fitting), samples=tuple(samples), refused=refused)


def draw_codes(
    model: Unified,
    params: Tree,
    prompts: Encoded,
    rows: Sequence[int],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    on_code: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The codes int64 [b, n] of the pictures that some of the prompts ask for.

    A picture is a function of the seed and its row, whatever the others of its batch are, up to rounding.

    Args:
        prompts: from `encode_drawings`.
    """
    drawing, codes = model.task("draw"), model.codes
    assert codes is not None
    assert model.vq is not None
    height, width = picture_shape(model.vq[0])
    number = height * width
    only_codes = sampling.allow_only(range(codes.first, codes.first + codes.number))
    phases = sampling.allow_in_phases((number, only_codes), (1, sampling.allow_only([codes.end])))

    def allowed(step: int, so_far: Tensor) -> Tensor:
        if on_code is not None and step <= number:
            on_code(step, number)
        return phases(step, so_far)

    selected = model.tasks.select(params, "draw")
    generated = chat.generate_answers(
        drawing.chat,
        system.model_weights(drawing, selected),
        chat.make_batch(drawing.chat, prompts, rows, side="left"),
        Sampling(max_tokens=number + 1, end=(codes.end,), temperature=temperature),
        params=selected,
        allowed=allowed,
        # A generator for each row: another batch size draws the same pictures.
        gen=[Generator().manual_seed(seed * 1_000_003 + row) for row in rows],
    )
    return torch.tensor(generated.ids) - codes.first


def decode_pictures(model: Unified, codes: Tensor) -> list[np.ndarray]:
    """Pictures uint8 [y, x, 3] of codes [b, n]."""
    assert model.vq is not None
    cfg, weights = model.vq
    device = next(iter(weights.values())).device
    pictures = []
    # One by one: the last bit of a picture must not depend on what else was in its batch.
    for row in codes:
        with torch.no_grad():
            pixels = vq.decode_codes(cfg, weights, row.view(1, *picture_shape(cfg)).to(device))
        pictures.append(vq.to_uint8(pixels)[0].cpu().numpy())
    return pictures


def draw_pictures(
    model: Unified,
    params: Tree,
    questions: Sequence[Conversation],
    folder: Path,
    *,
    batch: int = 8,
    temperature: float = 0.0,
    text_temperature: float | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """The pictures uint8 [y, x, 3] of questions whose images are files, also as `folder`/pictures/NUMBER.png.

    Codes are kept in `folder` batch by batch, and those that are there are not drawn again.

    Args:
        text_temperature: of questions without an image; None = as the others.
    Raises:
        ValueError: another process is drawing into `folder`, or it has pictures that are none of these.
    """
    prompts = encode_drawings(model, questions)
    temperatures = [temperature] * len(questions)
    if text_temperature is not None:
        temperatures = [temperature if question.images else text_temperature for question in questions]
    selected = model.tasks.select(params, "draw")
    # The size of a batch changes the last bits of what is computed.
    stamp = system.stamp_answers(
        model.task("draw"),
        selected,
        prompts,
        Sampling(seed=seed),
        files.file_digest,
        settings=[batch, model.task("draw").chat.cfg.window, *temperatures],
    )

    def draw_batch(rows: Sequence[int]) -> list[dict[str, Any]]:
        codes = draw_codes(model, params, prompts, rows, temperature=temperatures[rows[0]], seed=seed)
        return [{"codes": row.tolist()} for row in codes]

    batches = list[list[int]]()
    for of_batch in dict.fromkeys(temperatures):
        rows = [row for row, of_row in enumerate(temperatures) if of_row == of_batch]
        batches += [rows[i : i + batch] for i in range(0, len(rows), batch)]
    path = system.unfinished_answers(folder, f"{stamp}-codes")
    # Two processes would write the same file of codes.
    with files.file_lock(folder / "pictures"):
        numbers = range(len(questions))
        others = [p.name for p in (folder / "pictures").glob("*.png") if p.stem not in {*map(str, numbers)}]
        if others:
            raise ValueError(
                f"draw: {folder}/pictures must be new or hold pictures 0 to {len(questions) - 1} of the same questions, "
                f"found {few(sorted(others))}; give another folder or remove it"
            )
        files.remove_unfinished(folder / "pictures")
        lines = run_batches(path, batches, draw_batch, title="drawing")
        codes_of_row = {line["row"]: line["codes"] for line in lines}
        pictures = decode_pictures(model, torch.tensor([codes_of_row[row] for row in range(len(questions))]))
        (folder / "pictures").mkdir(exist_ok=True)
        for i, picture in enumerate(pictures):
            write_picture(Image.fromarray(picture), folder / "pictures" / f"{i}.png")
    return pictures


def write_picture(picture: Image.Image, path: PathLike) -> None:
    """Write a picture as PNG, whole or not at all."""
    with files.atomic(Path(path)) as tmp:
        picture.save(tmp, "PNG")
