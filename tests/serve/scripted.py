"""Processes behind a service that answer what is written here: a page's fields, HTML, constant pictures and numbers."""

import io
import time
from collections import deque

from attrs import evolve
from PIL import Image, ImageDraw

from medvl.documents.fields import fields_to_json
from medvl.phantoms.pages import PageConfig, draw_page
from medvl.serve.interface import End, Piece
from medvl.serve.pages import check_answers, check_json
from medvl.serve.worker import Calls
from medvl.slides.relevance import TopPatch

HTML = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> **bold** ${7*7} {{8*8}}"


def page():
    """A drawn page of tests of a laboratory."""
    return draw_page(PageConfig(), "bench", 0, kind="lab results", damage="clean")


def page_png():
    file = io.BytesIO()
    Image.fromarray(page().image).save(file, "PNG")
    return file.getvalue()


def answered_fields():
    """Those of the page, with a value that it does not show and one that is HTML."""
    fields = page().fields
    first, second, third, *others = fields.labs
    labs = (
        evolve(first, value="7777"),
        evolve(second, name=HTML),
        evolve(third, unit=others[0].unit),
        *others,
    )
    return evolve(fields, labs=labs)


class Scripted:
    """A language model that answers the fields of the page where a schema is asked for, else HTML and the question."""

    def __init__(self, post, emit, rows):
        self._emit, self._waiting = emit, deque()
        self.info = {"model": "toy", "models": ["toy", "liver", "lung"], "dtype": "float32", "device": "cpu"}

    def submit(self, call, content):
        self._waiting.append((call, content))

    def cancel(self, call):
        self._waiting = deque(one for one in self._waiting if one[0] != call)

    @property
    def is_idle(self):
        return not self._waiting

    def load(self):
        return {}

    def work(self, interrupted):
        while self._waiting:
            call, request = self._waiting.popleft()
            text = f"{HTML}\nYou asked: {request.messages[-1]['content']} (turn {len(request.messages)})"
            if request.schema is not None:
                text = fields_to_json(answered_fields())
            pieces = [text[i : i + 40] for i in range(0, len(text), 40)]
            for piece in pieces:
                self._emit(call, Piece(text=piece))
                if not request.schema:
                    time.sleep(0.01)
                interrupted()
            adapters = (("liver", 0.75), ("lung", 0.25)) if request.adapter == "auto" else ()
            end = End(
                reason="end",
                prompt_tokens=9,
                answer_tokens=len(pieces),
                model="toy",
                adapters=adapters,
                total_s=0.1,
            )
            self._emit(call, end)


def open_reader(post, emit):
    """Reads the words that the page was drawn with."""
    words = list(page().texts)
    functions = {"read": lambda image: words, "check": check_answers, "check_json": check_json}
    return Calls(emit, functions, {})


def _png(shade, text=""):
    image = Image.new("RGB", (160, 120), (shade, shade, 160))
    ImageDraw.Draw(image).text((10, 50), text, "white")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def open_ct(post, emit):
    def classify(content, findings, settings, with_slices):
        names = findings or ["Emphysema", "Lung nodule", HTML]
        probability = {name: 0.9 / (place + 1) for place, name in enumerate(names)}
        slices = [_png(20 * i, f"slice {i}") for i in range(8 * with_slices)]
        return {"probability": probability, "threshold": {names[0]: 0.5}, "slices": slices}

    return Calls(emit, {"classify": classify}, {"run": "ct_clip-1234abcd"})


def open_slides(post, emit):
    def ask(question, content, slide, max_tokens):
        patches = [
            TopPatch(rank=i, row=i, x=512 * i, y=256, relevance=0.5 / i, percentile=99.0 - i)
            for i in (1, 2, 3)
        ]
        return {"text": f"{HTML}\n{question}", "patches": patches, "map": _png(60, "map")}

    return Calls(emit, {"ask": ask}, {"run": "slide_vqa-1234abcd"})


def open_unified(post, emit):
    def ask(question, image, max_tokens):
        return f"{HTML}\n{question} ({'an image' if image else 'no image'})"

    def draw(text, image, temperature, seed):
        return _png(90, f"seed {seed}")

    return Calls(emit, {"ask": ask, "draw": draw}, {"run": "unified-1234abcd"})
