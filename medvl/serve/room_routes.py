"""Routes of the other systems: findings of CTs, slides, questions to a registry, and unified's answers and pictures."""

from typing import Any

from fastapi import FastAPI, Request

from medvl.serve import extract, interface, responses
from medvl.serve.forms import Form, form_schema, read_adapter, read_form, read_wish, until_gone
from medvl.serve.http import seen
from medvl.serve.interface import Refused
from medvl.serve.site import Site, answer_whole, png_address, text_answer
from medvl.serve.worker import Worker

_CT = ("findings", "hu", "spacing_from", "slices")
_SLIDES = ("question", "slide", "max_tokens")
_ASK = ("question", "adapter", "max_tokens", "pages", "window")
_UNIFIED = ("question", "max_tokens", "pages", "window", "temperature", "seed")


def add_routes(app: FastAPI, site: Site) -> None:
    """Add them to a service."""
    backend, deadline_s = site.backend, site.cfg.deadline_s

    def about(room: Worker) -> dict[str, Any]:
        seconds = {"total": round(seen().elapsed, 4)}
        return {"id": seen().id, "model": room.info.get("run", ""), "seconds": seconds}

    @app.post("/ct/classify", response_model=responses.Classified, openapi_extra=form_schema("CT", _CT))
    async def classify(request: Request) -> Any:
        """Zero-shot findings of a chest CT (NIfTI); findings: one a line, those of the run if left out."""
        room = backend.room("ct")
        form = await read_form(request, site.cfg.limits, _CT)
        findings = [line.strip() for line in form.texts.get("findings", "").splitlines() if line.strip()]
        settings = [f"{name}={form.texts[name]}" for name in ("hu", "spacing_from") if name in form.texts]
        work = room.call(
            seen().id,
            "classify",
            deadline_s,
            content=_only_file(form),
            findings=findings,
            settings=settings,
            with_slices=form.flag("slices", False),
        )
        found = await until_gone(request, work)
        rows = [
            responses.Finding(name=name, probability=p, threshold=found["threshold"].get(name))
            for name, p in found["probability"].items()
        ]
        return responses.Classified(
            findings=rows, slices=[png_address(png) for png in found["slices"]], **about(room)
        )

    @app.post(
        "/slides/ask", response_model=responses.SlideAnswer, openapi_extra=form_schema("Slide", _SLIDES)
    )
    async def ask_slide(request: Request) -> Any:
        """An answer about a slide: a file of patch features (.h5, .pt), or one of the run by its name."""
        room = backend.room("slides")
        form = await read_form(request, site.cfg.limits, _SLIDES)
        slide = form.texts.get("slide", "").strip()
        if bool(slide) == bool(form.files):
            raise Refused(422, "give either a file of patch features or the name of a slide of the run")
        work = room.call(
            seen().id,
            "ask",
            deadline_s,
            question=_question(form),
            content=_only_file(form) if form.files else b"",
            slide=slide,
            max_tokens=form.max_tokens(site.cfg.max_tokens) or 128,
        )
        answer = await until_gone(request, work)
        patches = [responses.Patch.model_validate(patch, from_attributes=True) for patch in answer["patches"]]
        return responses.SlideAnswer(
            text=answer["text"], patches=patches, map=png_address(answer["map"]), **about(room)
        )

    @app.post("/adapters/ask", response_model=responses.Analysed, openapi_extra=form_schema("Ask", _ASK))
    async def ask_adapters(request: Request) -> Any:
        """An answer with the adapters of the registry that fit the question, or with those that are named."""
        form = await read_form(request, site.cfg.limits, _ASK)
        images = await _images(request, site, form)
        asked = interface.Request(
            id=seen().id,
            messages=({"role": "user", "content": "<image>\n" * len(images) + _question(form)},),
            images=tuple(images),
            adapter=read_adapter(form.texts.get("adapter", "")) or "auto",
            max_tokens=form.max_tokens(site.cfg.max_tokens),
            deadline_s=deadline_s,
        )
        return text_answer(*await answer_whole(request, site, asked))

    @app.post("/unified/ask", response_model=responses.TextAnswer, openapi_extra=form_schema("Ask", _UNIFIED))
    async def ask_unified(request: Request) -> Any:
        """An answer about an image."""
        room = backend.room("unified")
        form = await read_form(request, site.cfg.limits, _UNIFIED)
        content = {
            "question": _question(form),
            "image": await _image(request, site, form),
            "max_tokens": form.max_tokens(site.cfg.max_tokens) or 256,
        }
        text = await until_gone(request, room.call(seen().id, "ask", deadline_s, **content))
        return responses.TextAnswer(text=text, **about(room))

    @app.post("/unified/draw", response_model=responses.Drawn, openapi_extra=form_schema("Draw", _UNIFIED))
    async def draw_unified(request: Request) -> Any:
        """The picture that a text asks for, from an image or without one."""
        room = backend.room("unified")
        form = await read_form(request, site.cfg.limits, _UNIFIED)
        content = {
            "text": _question(form),
            "image": await _image(request, site, form),
            "temperature": form.number("temperature", 0, 0, 100),
            "seed": int(form.number("seed", 0, 0, 2**53)),
        }
        png = await until_gone(request, room.call(seen().id, "draw", deadline_s, **content))
        return responses.Drawn(picture=png_address(png), **about(room))


def _question(form: Form) -> str:
    question = form.texts.get("question", "").strip()
    if not question:
        raise Refused(422, "question must have text")
    return question


def _only_file(form: Form) -> bytes:
    if len(form.files) != 1:
        raise Refused(422, f"send one file, got {len(form.files)}")
    return form.files[0]


async def _images(request: Request, site: Site, form: Form) -> list[Any]:
    """The pages of the files of a form; none where it has no file."""
    if not form.files:
        return []
    wish = read_wish(form, site.cfg)
    pages, images = await until_gone(request, extract.open_files(site.backend, seen().id, form.files, wish))
    seen().count(pages=len(pages), pixels=sum(page.width * page.height for page in pages))
    return images


async def _image(request: Request, site: Site, form: Form) -> Any:
    images = await _images(request, site, form)
    if len(images) > 1:
        raise Refused(422, f"send one image, got {len(images)}; choose a page by pages")
    return images[0] if images else None
