"""The tabs of the page: what the user gives, how the service is asked, and what is shown of its answer.

Files are in the memory of this process and not for long: gradio writes an upload into its folder, from which it is read
and removed at once.
"""

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from medvl.serve import ui_html as html
from medvl.serve.ui_client import Service, Unanswered, data_address

_log = logging.getLogger(__name__)
_KEEP_S = 600  # that files stay in memory behind their upload
_CHOOSE = f"choose a file (it is forgotten after {_KEEP_S // 60} minutes)"
_TURNS = 20  # of a conversation that are kept
_PATCH = ("rank", "x", "y", "relevance", "percentile")
Results = Iterator[tuple[Any, ...]]  # what the outputs show, again and again


# What the tabs share ----------------------------------------------------------------------------------------
def _upload(label: str) -> gr.State:
    """A place for files; the state holds their bytes."""
    files = gr.File(label=label, file_count="multiple", height=140)
    with gr.Row():
        note = gr.HTML()
        remove = gr.Button("Remove files", size="sm", scale=0, min_width=110)
    contents = gr.State([], time_to_live=_KEEP_S)

    def take(paths: list[str]) -> tuple[Any, ...]:
        try:
            taken = [_read_and_remove(Path(path)) for path in paths or ()]
        except OSError:
            return None, [], html.fault("choose the file again")
        size = sum(map(len, taken))
        text = f"{len(taken)} in memory ({size:,} bytes)"
        return None, taken, html.block(html.tag("p", text))

    files.upload(take, [files], [files, contents, note], api_visibility="private")
    remove.click(lambda: ([], ""), None, [contents, note], api_visibility="private")
    return contents


def _read_and_remove(path: Path) -> bytes:
    try:
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # a folder of this file, unless another user sends the same one
            path.parent.rmdir()


def _on_click(
    button: gr.Button,
    handler: Callable[..., Results],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    status: gr.HTML,
    keep: bool = False,
) -> Any:
    """Show what a handler yields. What was shown before goes at once, so that no answer stands beside another's fault.

    Args:
        keep: it stays, as in a conversation.
    """
    empty = [gr.skip() if keep else "" for _ in outputs]

    def answer(*values: Any) -> Results:
        yield html.block(html.tag("p", "asking the service ...")), *empty
        try:
            for results in handler(*values):
                yield "", *results
            return
        except Unanswered as e:
            message = str(e)
        except Exception as e:
            # Its message may hold a text of a page: only the place is told.
            place = traceback.extract_tb(e.__traceback__)[-1]
            _log.error("%s in %s, line %s", type(e).__name__, place.filename, place.lineno)
            message = f"the page failed ({type(e).__name__}); its log says where"
        yield html.fault(message), *empty

    return button.click(answer, list(inputs), [status, *outputs], api_visibility="private")


def _need(value: Any, what: str) -> None:
    if not value or (isinstance(value, str) and not value.strip()):
        raise Unanswered(f"{what} first")


def _adapter_choice(nothing: str = "as served") -> gr.Dropdown:
    info = f'a name, or a mixture as {{"liver": 0.5, "lung": 0.5}}; nothing = {nothing}'
    return gr.Dropdown(choices=[""], value="", label="Adapter", info=info, allow_custom_value=True)


# Tabs -------------------------------------------------------------------------------------------------------
def extract_tab(service: Service) -> gr.Dropdown:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            files = _upload("Page: picture, PDF, DICOM")
            adapter = _adapter_choice()
            with gr.Accordion("Own schema and prompt", open=False):
                schema = gr.Textbox(label="JSON schema", lines=6, info="nothing = the fields of medvl")
                prompt = gr.Textbox(label="Prompt", lines=2)
                pages = gr.Textbox(label="Pages", info="from 0, with commas; nothing = all")
                window = gr.Textbox(label="Window", info="black,white of more than 8 bits")
            strict = gr.Checkbox(label="Strict: leave out what no page shows")
            fhir = gr.Checkbox(label="As a FHIR Bundle, too (asks a second time)")
            button = gr.Button("Extract", variant="primary")
        with gr.Column(scale=5):
            status = gr.HTML()
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    page = gr.HTML(elem_id="page")
                with gr.Column(scale=4, min_width=320):
                    values = gr.HTML(elem_id="values")
            with gr.Accordion("JSON", open=False):
                fields = gr.HTML(elem_id="json")
            with gr.Accordion("FHIR", open=False):
                bundle = gr.HTML(elem_id="fhir")

    def extract(files: list[bytes], fhir: bool, strict: bool, *texts: str) -> Results:
        _need(files, _CHOOSE)
        names = ("adapter", "schema", "prompt", "pages", "window")
        wish: dict[str, Any] = dict(zip(names, texts, strict=True), strict=strict)
        answer = service.post("/extract", files, pictures=True, **wish)
        shown = html.pages(answer), html.values(answer)
        for of_page in answer["pages"]:
            of_page["picture"] = ""  # seen above
        tree = html.block(html.code(answer))
        yield *shown, tree, html.block(html.tag("p", "asking ..." if fhir else "not asked for"))
        if fhir:
            try:
                made = html.code(service.post("/extract", files, format="fhir", **wish))
            except Unanswered as e:
                made = html.tag("p", str(e), kind="fault")
            yield *shown, tree, html.block(made)

    inputs = [files, fhir, strict, adapter, schema, prompt, pages, window]
    _on_click(button, extract, inputs, [page, values, fields, bundle], status)
    return adapter


def analyse_tab(service: Service) -> gr.Dropdown:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            files = _upload("Page or image")
            prompt = gr.Textbox(label="Prompt", lines=3, placeholder="Describe what this shows.")
            adapter = _adapter_choice()
            button = gr.Button("Analyse", variant="primary")
            stop = gr.Button("Stop")
        with gr.Column(scale=5):
            status = gr.HTML()
            text = gr.Textbox(label="Answer", lines=14, max_lines=40, elem_id="analysis", interactive=False)
            about = gr.HTML()

    def analyse(files: list[bytes], prompt: str, adapter: str) -> Results:
        _need(files, _CHOOSE)
        answer = ""
        for event in service.stream("/analyze", files, prompt=prompt, adapter=adapter):
            answer += event["text"]
            yield answer, html.block(html.seconds(event)) if "seconds" in event else ""

    asked = _on_click(button, analyse, [files, prompt, adapter], [text, about], status)
    stop.click(None, None, None, cancels=[asked], api_visibility="private")
    return adapter


def ct_tab(service: Service) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            files = _upload("Chest CT: .nii or .nii.gz")
            findings = gr.Textbox(label="Findings", lines=6, info="one a line; nothing = those of the run")
            with gr.Accordion("Greys and spacing", open=False):
                hu = gr.Textbox(label="Hounsfield units from", info="as `invoke preprocess --set hu=`")
                spacing = gr.Textbox(label="Spacing from", info="as `invoke preprocess --set spacing_from=`")
            button = gr.Button("Find", variant="primary")
        with gr.Column(scale=5):
            status = gr.HTML()
            found = gr.HTML(elem_id="findings")

    def classify(files: list[bytes], findings: str, hu: str, spacing: str) -> Results:
        _need(files, _CHOOSE)
        answer = service.post(
            "/ct/classify", files, findings=findings, hu=hu, spacing_from=spacing, slices=True
        )
        rows = sorted(answer["findings"], key=lambda row: -row["probability"])
        shown = html.bars(
            ("Finding", "Probability"), [(row["name"], row["probability"], row["threshold"]) for row in rows]
        )
        mark = "The red line is the threshold of the validation split, where the run has one."
        slices = html.tag("h3", "Slices, from bottom to top"), html.pictures(answer["slices"])
        yield (html.block(shown, html.tag("p", mark), html.seconds(answer), *slices),)

    _on_click(button, classify, [files, findings, hu, spacing], [found], status)


def slides_tab(service: Service) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            files = _upload("Patch features: .h5 or .pt")
            slide = gr.Textbox(label="or a slide of the run, by its name")
            question = gr.Textbox(label="Question", lines=2)
            button = gr.Button("Ask", variant="primary")
        with gr.Column(scale=5):
            status = gr.HTML()
            found = gr.HTML(elem_id="slide")

    def ask(files: list[bytes], slide: str, question: str) -> Results:
        _need(files or slide, "choose a file, or name a slide")
        _need(question, "ask a question")
        answer = service.post("/slides/ask", files, slide=slide, question=question)
        rows = [[patch[name] for name in _PATCH] for patch in answer["patches"]]
        text = html.tag("h3", "Answer"), html.code(answer["text"])
        patches = html.tag("h3", "Patches that the answer looked at most"), html.table(_PATCH, rows)
        yield (html.block(*text, html.seconds(answer), *patches, html.picture(answer["map"])),)

    _on_click(button, ask, [files, slide, question], [found], status)


def ask_tab(service: Service) -> gr.Dropdown:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            model = gr.Dropdown(choices=[], label="Model", allow_custom_value=True)
            task = gr.Radio(["Ask", "Draw"], value="Ask", label="Task", info="unified models draw")
            files = _upload("Image")
            question = gr.Textbox(label="Question, or what to draw", lines=3)
            with gr.Accordion("Chance", open=False):
                temperature = gr.Number(0, label="Temperature", info="0 = the likeliest", minimum=0)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            button = gr.Button("Send", variant="primary")
            new = gr.Button("New conversation")
        with gr.Column(scale=5):
            status = gr.HTML()
            shown = gr.HTML(elem_id="conversation")
    history = gr.State([], time_to_live=6 * _KEEP_S)

    def send(history: Any, model: str, task: str, files: Any, question: str, *chance: float) -> Results:
        _need(model, "choose a model")
        _need(question, "type a question")
        chosen = {"temperature": chance[0] or 0, "seed": chance[1] or 0}
        images = [data_address(content) for content in files]
        turn: dict[str, Any] = {"question": question, "images": images, "answer": "", "picture": ""}
        turns = [*history, turn][-_TURNS:]
        if task == "Draw":
            turn["picture"] = service.post("/unified/draw", files, question=question, **chosen)["picture"]
        elif model.startswith("unified:"):
            turn["answer"] = service.post("/unified/ask", files, question=question)["text"]
        else:
            for piece in service.chat({"model": model, "messages": _messages(turns), **chosen}):
                turn["answer"] += piece
                yield gr.skip(), html.turns(turns)
        yield turns, html.turns(turns)

    inputs = [history, model, task, files, question, temperature, seed]
    _on_click(button, send, inputs, [history, shown], status, keep=True)
    new.click(lambda: ([], "", ""), None, [history, shown, status], api_visibility="private")
    return model


def _messages(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation as OpenAI's API takes it; the last turn is to be answered. Drawn pictures are no part of it."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if turn["picture"]:
            continue
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": image}} for image in turn["images"]
        ]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn["question"]}]})
        if turn is not turns[-1]:
            messages.append({"role": "assistant", "content": turn["answer"]})
    return messages


def adapters_tab(service: Service) -> gr.Dropdown:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            files = _upload("Images")
            question = gr.Textbox(label="Question", lines=3)
            adapter = _adapter_choice("those that fit the question")
            button = gr.Button("Ask", variant="primary")
        with gr.Column(scale=5):
            status = gr.HTML()
            found = gr.HTML(elem_id="adapters")

    def ask(files: list[bytes], question: str, adapter: str) -> Results:
        _need(question, "ask a question")
        answer = service.post("/adapters/ask", files, question=question, adapter=adapter)
        weights = [(entry["name"], entry["weight"], None) for entry in answer["adapters"]]
        chosen = html.bars(("Adapter that answered", "Weight"), weights)
        if not weights:
            chosen = html.tag("p", "the model itself answered, without an adapter")
        text = html.tag("h3", "Answer"), html.code(answer["text"])
        yield (html.block(*text, chosen, html.seconds(answer)),)

    _on_click(button, ask, [files, question, adapter], [found], status)
    return adapter


def benchmarks_tab(service: Service) -> None:
    with gr.Row():
        button = gr.Button("Show results and state", variant="primary", scale=0, min_width=260)
    status = gr.HTML()
    shown = gr.HTML(elem_id="benchmarks")

    def show() -> Results:
        health, told = service.get("/health"), service.get("/benchmark")
        parts = [html.tag("h3", "How the models were made")]
        for model in told["models"]:
            parts.append(html.fold(f"{model['name']}: record", html.code(model["record"])))
            if model["card"]:
                parts.append(html.fold(f"{model['name']}: card", html.code(model["card"])))
        for file in told["files"]:
            rows = file["rows"] if isinstance(file["rows"], list) else [file["rows"]]
            parts += [html.tag("h3", file["file"]), html.records(rows)]
        processes = health["processes"]
        keys = dict.fromkeys(key for facts in processes.values() for key in facts)
        rows = [[key, *(facts.get(key) for facts in processes.values())] for key in keys]
        state = f"State: {health['status']}, version {health['version']}"
        yield (html.block(*parts, html.tag("h3", state), html.table(("", *processes), rows)),)

    _on_click(button, show, [], [shown], status)
