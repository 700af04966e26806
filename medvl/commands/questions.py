"""`invoke ask`: one question to a trained run, or to a registry of adapters."""

from collections.abc import Sequence
from pathlib import Path

from medvl.base import config
from medvl.evaluation import report
from medvl.language.images import check_window
from medvl.systems.adapters.ask import ask_registry
from medvl.systems.run import find_system
from medvl.systems.system import Question
from medvl.systems.unified.model import open_plugin
from medvl.systems.unified.record import CLIP
from medvl.systems.unified.run import ask_opened

# Options that make sense with a registry; a system lists its own in `System.takes`.
REGISTRY_TAKES = ("--image", "--mode", "-k", "--own", "--base", "--set")
PLUGIN_TAKES = ("--image", "--base", "--tower", "--quantize", "--page", "--window")


def print_answer(
    text: str,
    *,
    adapters: str = "",
    run: str = "",
    slide: str = "",
    images: Sequence[str] = (),
    mode: str = "",
    k: int = -1,
    own: str = "",
    base: str = "",
    out: str = "maps",
    max_tokens: int = 256,
    offset: str = "",
    overrides: Sequence[str] = (),
    plugin: str = "",
    tower: str = CLIP,
    quantize: str = "none",
    page: int | None = None,
    window: str = "",
) -> None:
    """Print the answer of a registry of adapters, of a run or of a plugin, and where it came from.

    Args:
        plugin: folder of a plugin to understand, on its base.
        page, window: of the image; see `parse_window`.
        run: the folder of a run, or its config.json.
        mode: how adapters are combined; "" is "mixture".
        k: adapters at most; -1 is the run's `retrieve.k` (of a registry 3).
        own: the adapter of mode "oracle".
        base: the model of a registry or a plugin, if it lies elsewhere.
    Raises:
        ValueError: none or several of a registry and a run; a run that answers no questions; an option that
            it does not take; as what answers.
    """
    _check_arguments(adapters, run, plugin, max_tokens)
    value_of_flag = {
        "--image": images,
        "--slide": slide,
        "--mode": mode,
        "-k": k >= 0,
        "--own": own,
        "--base": base,
        "--tower": tower != CLIP,
        "--quantize": quantize != "none",
        "--set": overrides,
        "--offset": offset,
        "--page": page is not None,
        "--window": window,
    }
    # Before defaults are filled in: "mixture" that was not asked for must not be refused.
    flags = [flag for flag, value in value_of_flag.items() if value]
    question = Question(
        text=text,
        images=tuple(images),
        slide=slide,
        mode=mode or "mixture",
        k=k,
        adapter=own,
        out=out,
        offset=offset,
        max_tokens=max_tokens,
        overrides=tuple(overrides),
        page=page,
        window=parse_window(window),
        on_token=print_piece,
    )
    if adapters:
        _check_question(question, flags, f"{adapters} (a registry)", REGISTRY_TAKES)
        answer = ask_registry(adapters, question, base)
    elif plugin:
        _check_question(question, flags, f"{plugin} (a plugin)", PLUGIN_TAKES)
        model, params = open_plugin(plugin, "understand", base=base, tower=tower, quantize=quantize)
        answer = ask_opened(model, params, question)
    else:
        answer = _ask_run(run, question, flags)
    print(answer)
    print(report.NOTICE)


def print_piece(text: str) -> None:
    """Print a piece of an answer at once."""
    print(text, end="", flush=True)


def parse_window(text: str) -> tuple[float, float] | None:
    """(black, white) of "black,white"; None of "".

    Raises:
        ValueError: not two numbers, the first the smaller.
    """
    if not text:
        return None
    try:
        levels = tuple(float(number) for number in text.split(","))
    except ValueError as e:
        raise ValueError(f"--window must be black,white, such as -160,240, got {text!r}") from e
    return check_window(levels, "--window")


def _check_arguments(adapters: str, run: str, plugin: str, max_tokens: int) -> None:
    if bool(adapters) + bool(run) + bool(plugin) != 1:
        raise ValueError(
            "ask: needs either --adapters REGISTRY (with --image), or --run RUN (with --image, or with "
            "--slide), or --plugin FOLDER (with --image)"
        )
    if max_tokens < 1:
        raise ValueError(f"ask: --max-tokens must be 1 or more, got {max_tokens}")


def _ask_run(run: str, question: Question, flags: Sequence[str]) -> str:
    folder = config.run_folder(run)
    # The system is known from the run's record: the caller need not say what kind of run it is.
    name = config.system_of(folder)
    system = find_system(name)
    if system.ask is None:
        raise ValueError(
            f"ask: {run} is a {name} run, which does not answer questions; `invoke classify` gives findings"
        )
    _check_question(question, flags, f"{run} ({name})", system.takes)
    return system.ask(folder, question)


def _check_question(question: Question, flags: Sequence[str], asked_of: str, takes: Sequence[str]) -> None:
    """Raise at options that what is asked does not take, and at texts and images that are none.

    Here and not in the systems, before any of them has spent a minute on loading weights.
    """
    wrong = [flag for flag in flags if flag not in takes]
    if wrong:
        raise ValueError(f"ask: {asked_of} takes {' and '.join(takes)}, not {wrong[0]}")
    # A shell turns an unset variable into an empty question.
    if not question.text.strip():
        raise ValueError("ask: the question must have text, got none")
    missing = [image for image in question.images if not Path(image).is_file()]
    if missing:
        raise ValueError(f"ask: {missing[0]}: there is no such image")
