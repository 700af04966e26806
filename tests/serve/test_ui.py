"""The page in a browser over a service that answers HTML, numbers and pictures as it is told.

The page runs in an environment of its own (gradio, playwright, no torch): $MEDVL_UI_PYTHON, else .venv-ui in the checkout.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from medvl.serve import ui_html
from medvl.serve.ui_client import Service, Unanswered
from tests.serve import scripted, toy_service

ROOT = Path(__file__).resolve().parents[2]
KEY, NAME = "a-key-of-the-page", "Jane Q Planted"
TABS = ["Extract", "Analyse", "CT findings", "Slides", "Ask and draw", "Adapters", "Benchmarks"]
# `invoke` with a list of all that the process connects to.
INVOKE = """
import os, sys
def told(event, arguments):
    if event == "socket.connect":
        os.write(2, f"connect {arguments[1]}\\n".encode())
    elif event == "socket.getaddrinfo":
        os.write(2, f"resolve {arguments[0]}\\n".encode())
sys.addaudithook(told)
from invoke.main import program
program.run()
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    keys = folder / "keys.txt"
    keys.write_text(f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    run = folder / "drawn-1234abcd"
    (run / "results").mkdir(parents=True)
    (run / "config.json").write_text('{"system": "tune", "seed": 3}')
    rows = [{"what": "f1", "value": 0.912345, "n": 200}, {"what": scripted.HTML, "value": 0.5}]
    (run / "results" / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = "tests.serve.scripted:open_"
    rooms = {room: name + room for room in ("ct", "slides", "unified")}
    openers = {"opener": "tests.serve.scripted:Scripted", "readers": (name + "reader",), "rooms": rooms}
    with toy_service.running(**openers, keys=str(keys), runs=(str(run),)) as running:
        yield running


# Without a browser ------------------------------------------------------------------------------------------
def test_texts_are_escaped_wherever_they_stand():
    made = ui_html.block(
        ui_html.tag("p", scripted.HTML, title=scripted.HTML),
        ui_html.table((scripted.HTML,), [[scripted.HTML], [{"a": scripted.HTML}]]),
        ui_html.records([{scripted.HTML: scripted.HTML}]),
        ui_html.code(scripted.HTML),
        ui_html.bars((scripted.HTML,), [(scripted.HTML, 0.5, None)]),
        ui_html.turns([{"question": scripted.HTML, "images": [], "answer": scripted.HTML, "picture": ""}]),
    )
    assert "<script" not in made
    assert "<img" not in made
    assert made.count("&lt;script&gt;") == 12


@pytest.mark.parametrize(
    "address", ["javascript:alert(1)", "https://evil.test/x.png", "data:text/html,x", ""]
)
def test_only_pictures_of_the_service_are_shown(address):
    assert ui_html.picture(address) == ""
    assert ui_html.picture('data:image/png;base64,"onerror="x').count('"') == 2


def test_a_fault_is_one_plain_message(service):
    with pytest.raises(Unanswered, match="--key-env"):
        Service(address=service.address).get("/v1/models")
    asked = Service(address=service.address, key=KEY)
    assert KEY not in repr(asked)
    with pytest.raises(Unanswered, match=r"not served here: there is no such address \(status 404\)"):
        asked.get("/nothing")
    with pytest.raises(Unanswered, match="max_tokens must be a number"):
        list(asked.stream("/analyze", [scripted.page_png()], max_tokens="many"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Unanswered, match="does not answer"):
            Service(address=f"http://127.0.0.1:{unused.getsockname()[1]}").get("/health")


def test_without_gradio_it_says_what_to_install():
    hidden = "import sys; sys.modules['gradio'] = None; sys.argv[0] = 'invoke'\n"
    code = hidden + "from invoke.main import program; program.run()"
    run = subprocess.run(
        [sys.executable, "-c", code, "ui"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "pip install 'gradio>=6'" in run.stderr
    run = subprocess.run(
        [sys.executable, "-m", "invoke", "ui", "--api", "here"], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)


# In a browser -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def python():
    """The Python of the page's environment."""
    found = os.environ.get("MEDVL_UI_PYTHON", str(ROOT / ".venv-ui" / "bin" / "python"))
    if not Path(found).is_file():
        pytest.skip("no environment of the page: set MEDVL_UI_PYTHON, or make .venv-ui as .ci/run does")
    return found


@pytest.fixture(scope="module")
def page(python, service, tmp_path_factory):
    """What the browser saw, what the page's process wrote, files that it left, and how it ended."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    folder = tmp_path_factory.mktemp("page")
    file = folder / f"{NAME}.png"
    file.write_bytes(scripted.page_png())
    shots = Path(os.environ.get("MEDVL_UI_SHOTS", folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A proxy, which must not be asked.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MEDVL_KEY": KEY,
        "HTTP_PROXY": "http://10.0.0.1:9",
        "TMPDIR": str(folder),
    }
    command = [python, "-c", INVOKE, "ui", "--api", service.address, "--port", str(port)]
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        while "page at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port}"
        policy = httpx.get(address, trust_env=False).headers["content-security-policy"]
        drive = [python, str(ROOT / "tests/serve/drive_ui.py"), address, chromium]
        run = subprocess.run([*drive, str(file), str(shots)], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr + log.read_text()
        uploads = list(
            Path("/dev/shm" if Path("/dev/shm").is_dir() else folder).glob(f"medvl-ui-{process.pid}-*")
        )
        assert len(uploads) == 1
        # gradio makes an empty file for each upload, without its name.
        files = [path for path in uploads[0].rglob("*") if path.is_file()]
        left = [path for path in files if path.stat().st_size or NAME in str(path)]
        process.send_signal(signal.SIGTERM)
        status = process.wait(30)
    finally:
        process.kill()
    ended = (status, uploads[0].exists())
    seen = json.loads(run.stdout)
    return {"seen": seen, "log": log.read_text(), "left": left, "ended": ended, "policy": policy}


def test_seven_tabs_and_the_notice(page):
    assert page["seen"]["tabs"] == TABS
    assert page["seen"]["notice"]


@pytest.mark.parametrize("tab", TABS)
def test_text_of_a_model_is_never_html(page, tab):
    assert scripted.HTML in page["seen"][tab].replace("\n", " ")
    assert page["seen"][f"{tab}: injected"] == 0


def test_boxes_stand_on_the_page(page):
    seen = page["seen"]
    values = seen["Extract"]
    # Two wrong values and a unit; and the five values of the row whose name no page shows.
    assert "78 values, 8 of them not verified" in values
    assert re.search(r"7\s+missing\s+labs/0/value\s+7777", values)
    assert "the value is above its printed range" in values
    assert seen["boxes"] == 75
    width, *difference = seen["picture"]
    assert width == scripted.page().image.shape[1]
    assert max(map(abs, difference)) <= 1
    assert '"labs"' in seen["JSON"]
    assert json.dumps(scripted.HTML) in seen["JSON"]
    assert '"resourceType": "Bundle"' in seen["FHIR"]
    assert seen["JSON: injected"] == 0
    assert "draw 0." in values  # a part of its seconds


def test_no_answer_stands_beside_a_fault(page):
    assert page["seen"]["fault"].startswith("schema: ")
    assert page["seen"]["values beside a fault"].strip() == ""


def test_the_other_tabs_answer(page):
    seen = page["seen"]
    assert "Emphysema\t0.900" in seen["CT findings"]
    assert seen["slices"] == 8
    assert "512\t256\t0.5\t98" in seen["Slides"]
    assert "the second (turn 5)" in seen["Ask and draw"]  # behind four turns of the conversation
    assert re.search(r"liver\s+0\.750", seen["Adapters"])
    assert "0.9123" in seen["Benchmarks"]
    assert "drawn-1234abcd: record" in seen["Benchmarks"]


def test_two_users_see_their_own_answers(page):
    first, second = page["seen"]["at once"]
    assert "You asked: alpha alpha (turn 1)" in first
    assert "You asked: beta beta (turn 1)" in second
    assert "beta" not in first
    assert "alpha" not in second


def test_nothing_is_asked_elsewhere(page):
    (host,) = page["seen"]["hosts"]
    assert host.startswith("127.0.0.1:")
    assert page["policy"].startswith("default-src 'self' data: blob: ")
    connected = re.findall(r"(?:connect|resolve) (.*)", page["log"])
    assert connected
    assert all("127.0.0.1" in address for address in connected), connected


def test_nothing_of_a_patient_is_left(page):
    """Uploads are gone while the page runs, their folder with it; its log names nobody; no source has the key."""
    assert page["left"] == []
    assert page["ended"] == (0, False)
    log = re.sub(r"(?:connect|resolve) .*\n", "", page["log"])
    assert log.startswith("page at http://127.0.0.1:")
    assert log.count("\n") == 1, log
    assert all(KEY not in source for source in page["seen"]["sources"])


def test_the_page_loads_nothing_heavy(python):
    code = "import sys; from medvl.serve import ui; print([m for m in ('torch', 'transformers', 'cattrs') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr
