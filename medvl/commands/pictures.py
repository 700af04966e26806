"""`invoke draw`: a picture that a text asks for, or those of a file of texts."""

from pathlib import Path

from medvl.base import config, files
from medvl.base.display import progress_bar
from medvl.commands.questions import parse_window
from medvl.evaluation import report
from medvl.language import chat
from medvl.language.conversations import Conversation, read_records
from medvl.systems.unified import draw, run
from medvl.systems.unified.model import Unified, open_plugin
from medvl.systems.unified.record import CLIP


def draw_pictures(
    text: str,
    out: str,
    *,
    image: str = "",
    run_path: str = "",
    plugin: str = "",
    base: str = "",
    vq: str = "",
    tower: str = CLIP,
    quantize: str = "none",
    questions: str = "",
    batch: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    page: int | None = None,
    window: str = "",
) -> None:
    """Draw a picture into the PNG `out`, or those of a file of questions into the folder `out`.

    Args:
        run_path, plugin: the run of unified, or the folder of a plugin to draw; one of them.
        vq: folder of the VQ model of the plugin.
        questions: JSON lines {"text", "image" or nothing}, in place of text and image.
    Raises:
        ValueError: what does not go together, as `draw.draw_image`.
    """
    if bool(run_path) == bool(plugin):
        raise ValueError("draw: needs either --run RUN, or --plugin FOLDER with --vq FOLDER")
    if bool(text) == bool(questions) or (questions and (image or page is not None)):
        raise ValueError("draw: needs either --question (with --image or without) or --questions FILE")
    if text and not out.lower().endswith(".png"):
        raise ValueError(f"draw: pictures are PNG files, --out must end in .png, got {out!r}")
    # Before a model is loaded.
    files.check_writable(out, folder=bool(questions))
    levels = parse_window(window)
    if plugin:
        model, params = open_plugin(
            plugin, "draw", base=base, vq=vq, tower=tower, quantize=quantize, window=levels or ()
        )
    else:
        folder = config.run_folder(run_path)
        if config.system_of(folder) != "unified":
            raise ValueError(f"draw: {run_path} is a {config.system_of(folder)} run, which draws no pictures")
        model, params = run.load(folder)
    sampling = {"temperature": temperature, "seed": seed}
    if questions:
        asked = read_texts(model, questions)
        drawn = draw.draw_pictures(model, params, asked, Path(out), batch=batch, **sampling)  # type: ignore[arg-type]
        print(f"{out}/pictures: {len(drawn)} pictures")
    else:
        with progress_bar(None, "drawing, code", total=0) as bar:

            def show(code: int, number: int) -> None:
                bar.total = number
                bar.update(code - bar.n)

            picture = draw.draw_image(
                model,
                params,
                image or None,
                text,
                on_code=show,
                page=page,
                window=levels,
                **sampling,  # type: ignore[arg-type]
            )
        draw.write_picture(picture, out)
        print(f"{out}: {picture.width} x {picture.height} px")
    print(report.NOTICE)


def read_texts(model: Unified, path: files.PathLike) -> list[Conversation]:
    """The questions of a file: JSON lines {"text", "image" or nothing}; relative names start from its folder.

    Raises:
        ValueError: with the line, another shape, or an image that is not there.
    """
    questions = []
    for _, where, record in read_records(Path(path)):
        text, image = (record.get("text"), record.get("image")) if isinstance(record, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(image, str | None):
            raise ValueError(f'{where}: must be {{"text": text, "image": file name or nothing}}')
        images = [Path(path).parent / image] if image else []
        if images and not images[0].is_file():
            raise ValueError(f"{where}: {images[0]}: there is no such image")
        try:
            questions.append(chat.make_question(model.task("draw").chat, text, images))
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
    return questions
