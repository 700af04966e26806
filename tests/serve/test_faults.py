"""Clients that are slow, large or gone, processes that die or hang: what happens to their requests and to others."""

import io
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from medvl.serve.api import _read_results
from medvl.serve.backend import Backend, make_backend
from medvl.serve.settings import ServeConfig
from tests.serve import scripted, toy_service
from tests.serve.test_api import check_refusal, png
from tests.serve.toy_service import until

SCRIPTED = "tests.serve.scripted:Scripted"
HEAD = "POST /extract HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: {}\r\n\r\n"
PART = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x.png"\r\n\r\n'


def open_slow_reader(post, emit):
    """Reads and checks pages that are 41 or 42 pixels wide for a minute."""
    calls = scripted.open_reader(post, emit)
    read, check = calls._functions["read"], calls._functions["check"]

    def read_slowly(image):
        time.sleep(60 * (image.width == 41))
        return [] if image.width == 42 else read(image)

    def check_slowly(answers, pages, strict):
        time.sleep(60 * (pages == [[]]))
        return check(answers, pages, strict)

    calls._functions = {"read": read_slowly, "check": check_slowly}
    return calls


class Mute(scripted.Scripted):
    """A model that answers nothing."""

    @property
    def is_idle(self):
        return True

    def work(self, interrupted):
        pass


@pytest.fixture(scope="module")
def service():
    sizes = {"body_bytes": 2**20, "scan_bytes": 2**20, "all_bytes": 3 * 2**19}
    reader = "tests.serve.test_faults:open_slow_reader"
    with toy_service.running(opener=SCRIPTED, readers=(reader,), queue=2, rows=2, **sizes) as running:
        yield running


@pytest.fixture
def web(service):
    with toy_service.client(service) as client:
        yield client


def connect(service):
    host, port = service.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def received(connection):
    """All that comes until the other end hangs up."""
    content = b""
    while part := connection.recv(65536):
        content += part
    return content


FORMS = {
    "infinite pages": ({"pages": "inf"}, 422, "pages must be"),
    "pages that are no numbers": ({"pages": "nan"}, 422, "pages must be"),
    "half a page": ({"pages": "0.5"}, 422, "pages must be"),
    "an infinite window": ({"window": "-inf,inf"}, 422, "window must be"),
    "a nested mixture": ({"adapter": '{"a":' + "[" * 99_999}, 422, "adapter must be"),
    "a schema with a deep value": (
        {"schema": '{"type": "object", "properties": {}, "default": ' + "[" * 900 + "]" * 900 + "}"},
        400,
        "too deep",
    ),
}


@pytest.mark.parametrize(("form", "status", "message"), FORMS.values(), ids=FORMS)
def test_forms_that_cannot_be(web, form, status, message):
    check_refusal(web.post("/extract", files={"file": png()}, data=form, timeout=20), status, message)
    assert web.post("/extract", files={"file": png()}).status_code == 200


def test_a_form_of_a_charset_that_cannot_be(web):
    headers = {"content-type": "multipart/form-data; boundary=b; charset=undefined"}
    body = PART.replace(b'"file"; filename="x.png"', b'"prompt"') + b"Jane\r\n--b--\r\n"
    check_refusal(web.post("/extract", content=body, headers=headers), 400, "form cannot be read")


def test_a_client_that_goes_in_its_body_is_no_failure_of_the_service(service, web):
    with connect(service) as connection:
        connection.sendall(HEAD.format(5000).encode() + PART)
    until(lambda: 'medvl_requests_total{route="/extract",status="499"}' in web.get("/metrics").text)
    assert 'status="500"' not in web.get("/metrics").text


def test_bodies_of_all_requests_together_are_bounded(service, web):
    half = bytes(2**20 - 2**12)
    end = b"\r\n--b--\r\n"
    with connect(service) as first:
        first.sendall(HEAD.format(len(PART) + len(half) + len(end)).encode() + PART + half)
        guard = service.guard
        until(lambda: guard._held_bytes >= len(half))
        refused = web.post("/extract", files={"file": half})
        check_refusal(refused, 429, "send it again")
        assert int(refused.headers["retry-after"]) >= 1
        assert web.post("/extract", files={"file": png()}).status_code == 200  # a small one has room
        first.sendall(end)
        assert first.recv(12) == b"HTTP/1.1 415"
    until(lambda: guard._held_bytes == 0)
    check_refusal(web.post("/extract", files={"file": half}), 415, "by its content")


def test_a_body_that_comes_too_slowly_is_given_up():
    with toy_service.running(opener=SCRIPTED, deadline_s=0.5) as service, connect(service) as connection:
        connection.sendall(HEAD.format(5000).encode() + PART)
        assert received(connection).startswith(b"HTTP/1.1 408 ")


def test_a_document_of_more_pages_than_wait_at_a_time_is_answered(web):
    file = io.BytesIO()
    page = Image.open(io.BytesIO(png()))
    page.save(file, "TIFF", save_all=True, append_images=[page] * 4)
    answer = web.post("/extract", files={"file": file.getvalue()})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["pages"]) == 5


def test_a_killed_reader_is_back_and_its_request_refused(service, web):
    (reader,) = service.backend.readers
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(web.post("/extract", files={"file": png(41, 30)}))
    )
    asking.start()
    until(lambda: reader.pending)
    os.kill(reader.pid, signal.SIGKILL)
    asking.join()
    check_refusal(answers[0], 502, "send the request again")
    until(lambda: reader.state == "ready")
    assert web.post("/extract", files={"file": png()}).status_code == 200
    assert reader.pending == service.backend.engine.worker.pending == 0


@pytest.mark.parametrize("width", [41, 42])
def test_a_reader_that_hangs_makes_no_request_wait_for_ever(web, width):
    answer = web.post("/extract", files={"file": png(width, 30)}, data={"deadline_s": "0.5"}, timeout=30)
    check_refusal(answer, 504, "no answer within 0.5 s")


def test_a_client_that_goes_before_the_first_piece_of_a_stream_frees_the_model():
    with (
        toy_service.running(opener="tests.serve.test_faults:Mute") as service,
        toy_service.client(service) as client,
    ):
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=body, timeout=0.5)
        until(lambda: service.backend.engine.worker.pending == 0)


def test_models_that_are_not_known_yet_are_not_said_to_be_none():
    async def load(model):
        model.state = "loading"

    with toy_service.running(opener=SCRIPTED) as service, toy_service.client(service) as client:
        service.do(load(service.backend.engine.worker))
        check_refusal(client.get("/v1/models"), 503, "is loading")


def test_only_results_are_shown_and_no_folders(tmp_path):
    """Answers with texts of patients lie beside results."""
    row = {"what": "f1", "value": 0.5, "extra": {"data": "/srv/ward/scans"}}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "answers.jsonl").write_text(json.dumps({"question": "Jane", "answer": "Doe"}) + "\n")
    (tmp_path / "half.jsonl").write_text('{"what": "f1", "val')
    cfg = ServeConfig(results=(str(tmp_path),))
    backend = Backend(cfg=cfg, engine=None, model="", opener=None, checker=None, readers=[], rooms={})
    shown = {Path(file["file"]).name: file for file in _read_results(backend)}
    assert shown.keys() == {"results.jsonl", "half.jsonl"}
    assert shown["results.jsonl"]["rows"] == [row | {"extra": {"data": "scans"}}]
    assert "rows" not in shown["half.jsonl"]


def test_a_model_is_called_by_its_whole_name():
    assert make_backend(ServeConfig(model="Qwen/Qwen2.5-VL-7B-Instruct")).model == "Qwen2.5-VL-7B-Instruct"
    assert make_backend(ServeConfig(model="x/base", registry="a/ward.toml")).model == "ward"


def test_one_body_has_room_among_all():
    with pytest.raises(ValueError, match="all_bytes"):
        ServeConfig(all_bytes=2**20)
