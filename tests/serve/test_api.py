"""The service by real clients: every status, what it answers, and that nothing of a patient is told elsewhere."""

import base64
import hashlib
import io
import json
import socket
import struct
import threading
import zipfile
import zlib

import httpx
import pytest
from PIL import Image

from medvl.serve.api import _read_models
from medvl.serve.backend import Backend
from medvl.serve.pages import page_picture
from medvl.serve.settings import ServeConfig
from tests.serve import toy_service
from tests.serve.toy_service import until

KEY = "a-key-of-a-client"


def png(width=40, height=30):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(file, "PNG")
    return file.getvalue()


def claimed_png(width, height):
    """A PNG of 68 bytes and so that says it has many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("page.png", png())
    return file.getvalue()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# the ward\nsha256:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    with toy_service.running(
        keys=str(keys), body_bytes=2**20, max_tokens=300, origins=("http://127.0.0.1:7860",), deadline_s=30.0
    ) as running:
        yield running


@pytest.fixture
def web(service):
    with toy_service.client(service, headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


def chat_body(**changes):
    return {"messages": [{"role": "user", "content": "glucose"}], "max_tokens": 8, **changes}


def with_image(url):
    return [
        {
            "role": "user",
            "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}],
        }
    ]


FILES = {
    "400 too many pixels": (claimed_png(20000, 20000), 400, "pixels"),
    "400 a truncated picture": (png()[:60], 400, "cannot be read"),
    "415 a zip named .png": (zipped(), 415, "by its content"),
    "415 nothing": (b"", 415, "by its content"),
    "415 HTML": (b"<html>Jane Doe</html>", 415, "by its content"),
    "413 too many bytes": (b"\x89PNG" + bytes(2**20), 413, "bytes"),
}


@pytest.mark.parametrize(("content", "status", "message"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("route", ["/extract", "/analyze"])
def test_files_that_are_no_pages(web, route, content, status, message):
    answer = web.post(route, files={"file": ("Jane Doe.png", content, "image/png")})
    check_refusal(answer, status, message)


FORMS = {
    "no file": ({}, {}, 415, "multipart"),
    "a number that is none": ({"max_tokens": "many"}, {"file": png()}, 422, "max_tokens must be a number"),
    "too many tokens": (
        {"max_tokens": "301"},
        {"file": png()},
        422,
        "max_tokens must be a number from 1 to 300",
    ),
    "a flag that is none": ({"strict": "Jane"}, {"file": png()}, 422, "strict must be true or false"),
    "an unknown part": ({"Jane Doe": "1"}, {"file": png()}, 422, "it has another"),
    "a file in another part": ({}, {"Jane": png()}, 422, "part named 'file'"),
    "a format": ({"format": "Jane"}, {"file": png()}, 422, "format must be json or fhir"),
    "a schema that is no JSON": ({"schema": "Jane"}, {"file": png()}, 422, "schema"),
    "a name in a schema": (
        {"schema": '{"type": "object", "properties": {"Jane Doe": {"Jane": 1}}}'},
        {"file": png()},
        422,
        "is not supported",
    ),
    "a schema that is no object": ({"schema": '{"type": "string"}'}, {"file": png()}, 422, "schema"),
    "FHIR of another schema": (
        {"schema": '{"type": "object", "properties": {"a": {"type": "string"}}}', "format": "fhir"},
        {"file": png()},
        422,
        "FHIR",
    ),
    "strictness of another schema": (
        {"schema": '{"type": "object", "properties": {"a": {"type": "string"}}}', "strict": "true"},
        {"file": png()},
        422,
        "strict is for our own fields",
    ),
    "a window": ({"window": "5,1"}, {"file": png()}, 422, "window"),
    "a page that is not there": ({"pages": "3"}, {"file": png()}, 422, "page"),
    "pages that are none": ({"pages": "Jane"}, {"file": png()}, 422, "pages must be numbers"),
    "pages that are no number": ({"pages": "nan"}, {"file": png()}, 422, "pages must be numbers"),
    "an endless page": ({"pages": "inf"}, {"file": png()}, 422, "pages must be numbers"),
    "an endless window": ({"window": "0,1e400"}, {"file": png()}, 422, "window must be numbers"),
    "an adapter": ({"adapter": "Jane"}, {"file": png()}, 400, "adapter: there are liver"),
    "a mixture that is none": ({"adapter": '{"liver": "Jane"}'}, {"file": png()}, 422, "adapter must be"),
}


@pytest.mark.parametrize(("data", "files", "status", "message"), FORMS.values(), ids=FORMS)
def test_forms_that_cannot_be(web, data, files, status, message):
    check_refusal(web.post("/extract", data=data, files=files), status, message)


BODIES = {
    "no JSON": (b"{Jane", 400, "not JSON"),
    "no messages": ({"messages": []}, 422, "messages"),
    "a role": (chat_body(messages=[{"role": "Jane", "content": "x"}]), 422, "role"),
    "an answer at the end": (
        chat_body(messages=[{"role": "assistant", "content": "x"}]),
        400,
        "roles must be user",
    ),
    "tokens": (chat_body(max_tokens=301), 422, "max_tokens must be at most 300"),
    "a text for a number": (chat_body(max_tokens="Jane"), 422, "max_tokens"),
    "several answers": (chat_body(n=2), 400, "n: not supported"),
    "tools": (chat_body(tools=[{"type": "function"}]), 400, "tools: not supported"),
    "an address elsewhere": (
        chat_body(messages=with_image("http://169.254.169.254/Jane")),
        400,
        "nothing is fetched",
    ),
    "a local file": (chat_body(messages=with_image("file:///etc/passwd")), 400, "nothing is fetched"),
    "no base64": (chat_body(messages=with_image("data:image/png;base64,Jane!")), 400, "base64"),
    "no picture": (
        chat_body(messages=with_image("data:image/png;base64," + base64.b64encode(zipped()).decode())),
        415,
        "by its content",
    ),
    "a schema": (
        chat_body(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "Jane"}}}),
        400,
        "schema",
    ),
    "a model": (chat_body(model="Jane"), 400, "adapter: there are liver"),
    "far too long a prompt": (
        chat_body(messages=[{"role": "user", "content": "a " * 400_000}]),
        400,
        "at most 6,400 characters for a context of 400 tokens, got 800,000",
    ),
    "a special token in a schema": (
        chat_body(
            response_format={
                "type": "json_schema",
                "json_schema": {
                    "schema": {"type": "object", "properties": {"<|im_end|>": {"type": "string"}}}
                },
            }
        ),
        400,
        "special tokens",
    ),
    "a name in a schema": (
        chat_body(
            response_format={
                "type": "json_schema",
                "json_schema": {"schema": {"type": "object", "properties": {"Jane Doe": {"type": "Jane"}}}},
            }
        ),
        400,
        "schema: $....: type must be",
    ),
    "a stop that is empty": (chat_body(stop=[""]), 400, "stop"),
    "too long a prompt": (
        chat_body(messages=[{"role": "user", "content": "glucose " * 500}]),
        400,
        "within 400",
    ),
}


@pytest.mark.parametrize(("body", "status", "message"), BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_bodies_that_cannot_be(web, body, status, message, stream):
    if isinstance(body, dict):
        body = json.dumps(body | {"stream": stream}).encode()
    answer = web.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    check_refusal(answer, status, message)


def check_refusal(answer, status, message):
    """One error in OpenAI's form, without anything of the request."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["code"] == status
    assert "Jane" not in answer.text
    assert answer.headers["x-request-id"] == answer.json()["id"]


def test_analyses_take_no_wishes_of_fields(web):
    """They would be passed over, and who sends strict=true would believe that the text is checked."""
    for name in ("strict", "evidence", "format", "pictures"):
        answer = web.post("/analyze", files={"file": png()}, data={name: "true"})
        check_refusal(answer, 422, "a form may have the parts")


def test_media_types_are_of_any_case(web):
    body = '--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nglucose\r\n--x--\r\n'
    answer = web.post("/analyze", content=body, headers={"content-type": "Multipart/Form-Data; boundary=x"})
    check_refusal(answer, 422, "a request must have a file")
    answer = web.post(
        "/v1/chat/completions", content=json.dumps(chat_body()), headers={"content-type": "Application/JSON"}
    )
    assert answer.status_code == 200


def test_keys(service):
    with toy_service.client(service) as client:
        for header in (
            {},
            {"authorization": "Bearer no"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": KEY},
        ):
            for route in ("/metrics", "/v1/models", "/benchmark", "/openapi.json"):
                answer = client.get(route, headers=header)
                check_refusal(answer, 401, "a key is needed")
                assert answer.headers["www-authenticate"] == "Bearer"
            assert client.post("/extract", files={"file": png()}, headers=header).status_code == 401
        assert client.get("/health").json()["status"] == "ready"
        assert client.get("/ready").status_code == 200
        assert client.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_addresses_and_methods(web):
    check_refusal(web.get("/patients/Jane"), 404, "no such address")
    check_refusal(web.get("/extract"), 405, "another method")
    check_refusal(web.post("/ct/classify", files={"file": png()}), 404, "no run is served")
    check_refusal(web.post("/extract", json={"file": "Jane"}), 415, "multipart/form-data")
    check_refusal(
        web.post("/v1/chat/completions", content=b"x", headers={"content-type": "text/plain"}),
        415,
        "application/json",
    )


def test_a_body_without_a_length_is_refused_while_it_is_read(service):
    """Chunks are counted as they come: 8 MB of a stream that has no end are not read."""
    head = (
        "POST /extract HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
        f"authorization: Bearer {KEY}\r\ncontent-type: multipart/form-data; boundary=b\r\n\r\n"
    )
    part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="Jane.png"\r\n\r\n'
    host, port = service.address.removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + chunk(part))
        try:
            while sent < 64 * 2**20:
                connection.sendall(chunk(bytes(2**16)))
                sent += 2**16
        except OSError:
            pass  # it has hung up
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except OSError:
            pass
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sent < 16 * 2**20


def chunk(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_cross_origin(web):
    allowed = web.options(
        "/extract", headers={"origin": "http://127.0.0.1:7860", "access-control-request-method": "POST"}
    )
    assert allowed.headers["access-control-allow-origin"] == "http://127.0.0.1:7860"
    other = web.options(
        "/extract", headers={"origin": "http://evil.test", "access-control-request-method": "POST"}
    )
    assert "access-control-allow-origin" not in other.headers
    # A refusal can be read by the page, too.
    assert web.get("/nothing", headers={"origin": "http://127.0.0.1:7860"}).headers[
        "access-control-allow-origin"
    ]


def test_an_id_of_the_client_is_kept_unless_it_could_be_a_name(web):
    given = "0123456789abcdef" * 2
    assert web.get("/ready", headers={"x-request-id": given}).headers["x-request-id"] == given
    # A date of birth or the number of a record is of digits, too.
    for other in ("Jane Doe", "19500102", "12345678", given[:-1]):
        assert web.get("/ready", headers={"x-request-id": other}).headers["x-request-id"] != other


def test_answers_say_what_they_come_from(web):
    answer = web.post(
        "/extract",
        files={"file": png()},
        data={"max_tokens": "60", "adapter": '{"liver": 0.5, "lung": 0.25}'},
    ).json()
    assert answer["adapters"] == [{"name": "liver", "weight": 0.5}, {"name": "lung", "weight": 0.25}]
    assert answer["model"] == "toy"
    assert len(answer["revision"]) == 12
    assert "not for diagnosis" in answer["disclaimer"]
    assert {"open", "answer", "check", "total", "queued", "first_token"} <= answer["seconds"].keys()
    assert answer["usage"]["total_tokens"] > answer["usage"]["prompt_tokens"] > 0


def test_a_schema_of_the_client(web):
    schema = {
        "type": "object",
        "properties": {
            "drug": {"type": "string", "maxLength": 8},
            "dose": {"type": "integer", "minimum": 0, "maximum": 999},
        },
        "required": ["drug", "dose"],
        "additionalProperties": False,
    }
    answer = web.post(
        "/extract", files={"file": png()}, data={"schema": json.dumps(schema), "max_tokens": "60"}
    ).json()
    assert answer["fields"] is None
    assert answer["pages"][0]["answer"].keys() == {"drug", "dose"}
    asked = chat_body(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, max_tokens=60
    )
    text = web.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    assert json.loads(text).keys() == {"drug", "dose"}


def test_a_stream_is_the_answer_in_pieces(web):
    body = chat_body(max_tokens=30, temperature=0.5, seed=4)
    whole = web.post("/v1/chat/completions", json=body).json()
    with web.stream(
        "POST",
        "/v1/chat/completions",
        json=body | {"stream": True, "stream_options": {"include_usage": True}},
    ) as r:
        lines = [line.removeprefix("data: ") for line in r.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_a_client_that_leaves_frees_the_model(service, web):
    body = chat_body(max_tokens=300, stream=True)
    with web.stream("POST", "/v1/chat/completions", json=body) as r:
        next(r.iter_bytes())
    with pytest.raises(httpx.ReadTimeout):
        web.post("/v1/chat/completions", json=chat_body(max_tokens=300), timeout=0.05)
    until(lambda: service.backend.engine.worker.pending == 0)


def test_too_many_too_late_and_stopping():
    """429 with Retry-After, 504, and 503 while the service stops, which answers what it has accepted."""
    slow = "tests.serve.served_toy:open_slow_service"
    with (
        toy_service.running(rows=1, opener=slow, queue=2, deadline_s=4.0) as service,
        toy_service.client(service) as client,
    ):
        answers = {}

        def ask(name, **changes):
            with toy_service.client(service) as own:
                answers[name] = own.post("/v1/chat/completions", json=chat_body(**changes))

        model = service.backend.engine.worker
        threads = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        until(lambda: model.pending == 2)
        ask("c")
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers.values()) == [200, 200, 429]
        refused = next(answer for answer in answers.values() if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        ask("late", max_tokens=300)
        check_refusal(answers["late"], 504, "no answer within 4 s")
        last = threading.Thread(target=ask, args=("last",))
        last.start()
        until(lambda: model.pending == 1)
        service.stop()
        last.join()
        assert answers["last"].status_code == 200
        with pytest.raises(httpx.ConnectError):
            client.get("/ready")


def test_while_it_loads_it_is_alive_and_not_ready():
    async def load(model):
        model.state = "loading"

    with toy_service.running() as service:
        service.do(load(service.backend.engine.worker))
        with toy_service.client(service) as client:
            assert client.get("/health").json()["status"] == "loading"
            check_refusal(client.get("/ready"), 503, "not ready: model")
            answer = client.post("/v1/chat/completions", json=chat_body())
            check_refusal(answer, 503, "is loading")
            assert int(answer.headers["retry-after"]) >= 1


def test_nothing_of_a_patient_is_told(service, web, capfd, tmp_path):
    """A name in body, file name, header, prompt, address and answer: not in logs, metrics or errors."""
    name = "Jane Q Doenitz"
    form = {"prompt": name, "adapter": name, "schema": name}
    web.post("/extract", files={"file": (f"{name}.png", png())}, data={"prompt": name})
    web.post(
        "/extract",
        files={"file": (f"{name}.png", png())},
        data=form,
        headers={"x-request-id": name, "user-agent": name},
    )
    web.post(f"/{name}", content=name)
    web.get("/ready", params={"patient": name})
    web.post(
        "/v1/chat/completions", json=chat_body(messages=[{"role": "user", "content": name, "name": name}])
    )
    web.post(
        "/v1/chat/completions", json=chat_body(messages=[{"role": name, "content": name}], **{name: name})
    )
    web.post(
        "/v1/chat/completions", content=f"{{{name}".encode(), headers={"content-type": "application/json"}
    )
    web.post(
        "/v1/chat/completions",
        json=chat_body(
            response_format={
                "type": "json_schema",
                "json_schema": {"name": name, "schema": {"pattern": f"({name}", "type": "string"}},
            }
        ),
    )
    told = "".join(capfd.readouterr()) + web.get("/metrics").text + web.get("/health").text
    assert "/v1/chat/completions" in told
    for part in name.split():
        if len(part) > 1:
            assert part not in told


def test_pictures_of_pages_are_sent_where_they_are_wanted(web):
    form = {"files": {"file": png()}, "data": {"max_tokens": "30"}}
    (page,) = web.post("/extract", **form).json()["pages"]
    assert page["picture"] == ""
    form["data"]["pictures"] = "true"
    (page,) = web.post("/extract", **form).json()["pages"]
    head, _, data = page["picture"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert (picture.size, picture.getpixel((3, 3))) == ((40, 30), (200, 10, 10))


def test_pictures_of_large_pages_are_small():
    with Image.open(io.BytesIO(page_picture(Image.new("RGB", (900, 3200), "red")))) as picture:
        assert (picture.size, picture.getpixel((9, 9))) == ((450, 1600), (255, 0, 0))


def test_how_a_model_was_made_is_told_without_folders(tmp_path):
    run = tmp_path / "drawn-1234abcd"
    run.mkdir()
    record = {"system": "tune", "seed": 3, "data": {"folder": "/data/ward", "parts": ["../a/b"]}, "lr": 0.5}
    (run / "config.json").write_text(json.dumps(record))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    (model / "README.md").write_text("# A card")
    cfg = ServeConfig(runs=(str(run),), model=str(model))
    backend = Backend(cfg=cfg, engine=None, model="", opener=None, checker=None, readers=[], rooms={})
    record["data"] = {"folder": "ward", "parts": ["b"]}
    assert _read_models(backend) == [
        {"name": run.name, "card": "", "record": record},
        {"name": "model", "card": "# A card", "record": {}},
    ]


def test_a_file_that_ends_its_decoder_is_refused_and_disturbs_no_other():
    """A PDF of 2 KB that unpacks to more memory than its process may take, and pages beside it."""
    with toy_service.running(opener_mib=700) as service:
        answers = {}

        def ask(name, content):
            with toy_service.client(service) as client:
                answers[name] = client.post("/analyze", files={"file": content}, data={"max_tokens": "5"})

        jobs = [("bomb", memory_bomb())] + [(str(i), png(30 + i, 20)) for i in range(6)]
        threads = [threading.Thread(target=ask, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers.pop("bomb").status_code in (400, 413)
        assert {answer.status_code for answer in answers.values()} == {200}, [
            a.text for a in answers.values()
        ]
        ask("after", png())
        assert answers["after"].status_code == 200


def memory_bomb():
    """A PDF whose only stream is zeros, deflated twice."""
    stream = zlib.compress(zlib.compress(bytes(2**30), 9), 9)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 4 0 R >>",
        b"<< /Length %d /Filter [/FlateDecode /FlateDecode] >>\nstream\n%s\nendstream"
        % (len(stream), stream),
    ]
    body, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return (
        body
        + b"xref\n0 5\n0000000000 65535 f \n%strailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF"
        % (table, len(body))
    )
