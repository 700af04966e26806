"""/extract and /analyze: pages become fields with evidence, or what the model says of them."""

import asyncio
import datetime
import json
from typing import Any

from fastapi import FastAPI, Request, Response

from medvl.documents.evidence import Contradiction, Evidence
from medvl.documents.fields import fields_to_json, json_leaves, leaves
from medvl.serve import extract, fhir, interface, responses
from medvl.serve.extract import Extraction
from medvl.serve.forms import WISHES, Form, form_schema, read_form, read_wish, until_gone
from medvl.serve.http import seen
from medvl.serve.interface import Refused
from medvl.serve.site import (
    Site,
    answer_head,
    answer_whole,
    count_end,
    finish_reason,
    png_address,
    seconds_of,
    streamed,
    text_answer,
    usage_of,
)


def add_routes(app: FastAPI, site: Site) -> None:
    """Add them to a service."""

    names = (*WISHES, "evidence", "strict", "pictures", "format")
    analyze_names = (*WISHES, "temperature", "stream")

    @app.post("/extract", response_model=responses.Extracted, openapi_extra=form_schema("Extract", names))
    async def extract_fields(request: Request) -> Any:
        """Fields of a document, each with its place on the page or marked as unverified."""
        form = await read_form(request, site.cfg.limits, names)
        as_fhir = _wants_fhir(request, form)
        wish = read_wish(form, site.cfg)
        if wish.strict and wish.schema is not None:
            raise Refused(422, "strict is for our own fields: leave it or schema out, and see `unverified`")
        if as_fhir and wish.schema is not None:
            raise Refused(422, "FHIR is made of our own fields: leave schema out, or format")
        extraction = await until_gone(request, extract.extract(site.backend, seen().id, form.files, wish))
        _count_extraction(site, extraction)
        if as_fhir:
            if any(warning.kind == "patient" for warning in extraction.warnings):
                # All resources of a Bundle are about its one Patient.
                raise Refused(422, "the pages name different patients: send each document by itself")
            bundle = await asyncio.to_thread(_bundle, extraction, seen().id, app.version)
            return Response(json.dumps(bundle), media_type="application/fhir+json")
        return _extracted(extraction)

    @app.post(
        "/analyze",
        response_model=responses.Analysed,
        openapi_extra=form_schema("Analyze", analyze_names),
    )
    async def analyze(request: Request) -> Any:
        """What the model says of pages, as text; streamed with stream=true."""
        form = await read_form(request, site.cfg.limits, analyze_names)
        wish = read_wish(form, site.cfg)
        _, images = await until_gone(request, extract.open_files(site.backend, seen().id, form.files, wish))
        prompt = wish.prompt or "Describe what this shows."
        asked = interface.Request(
            id=seen().id,
            messages=({"role": "user", "content": "<image>\n" * len(images) + prompt},),
            images=tuple(images),
            adapter=wish.adapter,
            schema=wish.schema,
            max_tokens=wish.max_tokens,
            temperature=form.number("temperature", 0, 0, 100),
            deadline_s=wish.deadline_s,
        )
        if form.flag("stream", False):
            return await streamed(
                request,
                site,
                asked,
                lambda piece: {"text": piece},
                lambda end: [text_answer("", end)],
            )
        return text_answer(*await answer_whole(request, site, asked))


def _bundle(extraction: Extraction, request: str, version: str) -> Any:
    """The fields as FHIR; values of pages that were not read are all marked as unverified."""
    end = extraction.pages[0].end
    assert extraction.fields is not None
    assert end is not None
    return fhir.make_bundle(
        extraction.fields,
        extraction.evidence or Evidence(),
        software=f"medvl {version}",
        model=f"{end.model} {end.revision}".strip(),
        made_at=datetime.datetime.now(datetime.UTC),
        request=request,
        disclaimer=responses.DISCLAIMER,
        notices=[warning.message for warning in _warnings(extraction) if not warning.path],
    )


def _wants_fhir(request: Request, form: Form) -> bool:
    accepted = "fhir" if "application/fhir+json" in request.headers.get("accept", "") else "json"
    wanted = request.query_params.get("format") or form.texts.get("format") or accepted
    if wanted not in ("json", "fhir"):
        raise Refused(422, "format must be json or fhir")
    return wanted == "fhir"


def _count_extraction(site: Site, extraction: Extraction) -> None:
    for page in extraction.pages:
        seen().count(pages=1, pixels=page.width * page.height)
        assert page.end is not None
        count_end(site, page.end)
    for value in _values(extraction):
        site.metrics.values.labels(value.status).inc()
    for warning in _warnings(extraction):
        site.metrics.warnings.labels(warning.kind).inc()


def _values(extraction: Extraction) -> list[responses.FoundValue]:
    """The evidence as it is told. Values of an own schema are under the number of their page."""
    evidence, pages = extraction.evidence, extraction.page_evidence
    if evidence is not None:
        return [_value(value, value.path, value.page) for value in evidence.values]
    if pages:
        return [
            _printed(_value(value, f"{i}/{value.path}", i))
            for i, page in enumerate(pages)
            for value in page.values
        ]
    # Pages that were not read show nothing: no value may look as if it were verified.
    texts = (
        leaves(extraction.fields)
        if extraction.fields
        else json_leaves([page.tree for page in extraction.pages])
    )
    return [
        responses.FoundValue(path=path, text=text, status="unchecked", verified=False)
        for path, text in texts.items()
    ]


def _printed(value: responses.FoundValue) -> responses.FoundValue:
    """A value of an own schema: that it stands on the page does not say that it belongs where the answer has it."""
    return value.model_copy(update={"status": "printed", "verified": False}) if value.verified else value


def _warnings(extraction: Extraction) -> tuple[Contradiction, ...]:
    """Those about whole pages before those about values."""
    warnings = list(extraction.warnings)
    for page in extraction.pages:
        if page.end and page.end.reason == "length":
            message = f"the answer for page {page.number} of file {page.file} reached max_tokens and is not complete"
            warnings.append(Contradiction(path="", kind="cut", message=message))
    read_as = extraction.fields.read_as if extraction.fields else ""
    if read_as in ("prose", "repaired json"):
        message = f"an answer was not whole JSON and was read as {read_as}: compare the list of entries, too"
        warnings.append(Contradiction(path="", kind="prose", message=message))
    return (*warnings, *(extraction.evidence.warnings if extraction.evidence else ()))


def _value(value: Any, path: str, page: int | None) -> responses.FoundValue:
    return responses.FoundValue(
        path=path,
        text=value.text,
        status=value.status,
        verified=value.verified,
        page=page if value.box else None,
        box=value.box,
        score=round(value.score, 3),
        unshown=list(value.unshown),
    )


def _extracted(extraction: Extraction) -> responses.Extracted:
    values = _values(extraction)
    warnings = [
        responses.FoundWarning.model_validate(warning, from_attributes=True)
        for warning in _warnings(extraction)
    ]
    left_out = [
        responses.LeftOutValue(path=value.path, status=value.status, page=value.page)
        for value in (extraction.evidence.left_out if extraction.evidence else ())
    ]
    ends = [page.end for page in extraction.pages if page.end]
    return responses.Extracted(
        **answer_head(ends[0]),
        fields=None if extraction.fields is None else json.loads(fields_to_json(extraction.fields)),
        values=values,
        unverified=[value.path for value in values if not value.verified],
        left_out=left_out,
        warnings=warnings,
        pages=[_page(page) for page in extraction.pages],
        usage=usage_of(ends),
        seconds=seconds_of(extraction.seconds, ends),
    )


def _page(page: extract.Page) -> responses.PageAnswer:
    assert page.end is not None
    return responses.PageAnswer(
        file=page.file,
        page=page.number,
        width=page.width,
        height=page.height,
        finish_reason=finish_reason(page.end),
        answer=page.tree,
        picture=png_address(page.picture) if page.picture else "",
    )
