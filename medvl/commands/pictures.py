"""`invoke draw`: a picture that a text asks for, or those of a file of texts."""

from pathlib import Path

from medvl.base import config, files
from medvl.base.display import progress_bar
from medvl.commands.questions import parse_window
from medvl.evaluation import report
from medvl.language.drawings import read_texts
from medvl.systems.unified import draw, run
from medvl.systems.unified.model import open_plugin
from medvl.systems.unified.record import CLIP


def draw_pictures(
    text: str,
    out: str,
    *,
    image: str | None = None,
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
    if bool(text.strip()) == bool(questions) or (questions and (image is not None or page is not None)):
        raise ValueError("draw: needs either --question (with --image or without) or --questions FILE")
    if text and not out.lower().endswith(".png"):
        raise ValueError(f"draw: pictures are PNG files, --out must end in .png, got {out!r}")
    flags = {"--base": base, "--vq": vq, "--tower": tower != CLIP, "--quantize": quantize != "none"}
    # The run's greys are shown through its chat.window; of one picture there may be another.
    flags["--window"] = questions and window
    wrong = [flag for flag, value in flags.items() if value]
    if run_path and wrong:
        raise ValueError(f"draw: {run_path} is a run, which has this in its record: leave {wrong[0]} out")
    if image is not None and not Path(image).is_file():
        raise ValueError(f"draw: {image or repr(image)}: there is no such image")
    # Before a model is loaded.
    files.check_writable(Path(out) / "pictures" if questions else out, folder=bool(questions))
    levels = parse_window(window)
    asked = read_texts(questions) if questions else []
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
                image,
                text,
                on_code=show,
                page=page,
                window=levels,
                **sampling,  # type: ignore[arg-type]
            )
        draw.write_picture(picture, out)
        print(f"{out}: {picture.width} x {picture.height} px")
    print(report.NOTICE)
