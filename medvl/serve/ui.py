"""The page to look at it all: seven tabs over the HTTP service, which it asks as any client does.

It runs in an environment of its own, without torch.
"""

import threading
import time
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from medvl.serve import ui_html as html
from medvl.serve import ui_tabs
from medvl.serve.ui_client import Service, Unanswered

_LEFT_S = 60  # after which a file whose upload was broken off is removed
_USERS = 32  # that are answered at the same time
_FILE_SIZE = "512mb"  # as the service takes it for CT scans
# The browser loads nothing from elsewhere, whatever a component would like.
_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


def serve_page(service: Service, host: str, port: int, folder: str) -> None:
    """Serve the page until the process ends.

    Args:
        folder: where gradio writes uploads (its GRADIO_TEMP_DIR).
    Raises:
        ValueError: the address is in use.
    """
    page = make_page(service)
    page.queue(default_concurrency_limit=_USERS)
    threading.Thread(target=_remove_left_files, args=(Path(folder),), daemon=True).start()
    fonts = ["system-ui", "DejaVu Sans", "sans-serif"]  # of the system: others would be fetched
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            max_threads=2 * _USERS,
            max_file_size=_FILE_SIZE,
            theme=gr.themes.Default(font=fonts, font_mono=["DejaVu Sans Mono", "monospace"]),
            css=html.CSS,
            app_kwargs={"middleware": [Middleware(_Headers)], "openapi_url": None},
            prevent_thread_lock=True,
        )
    except OSError as e:
        raise ValueError(f"ui: cannot listen at {host}:{port}; choose another --port") from e
    print(f"page at http://{host}:{port} for the service at {service.address} ({html.NOTICE})", flush=True)
    page.block_thread()


class _Headers:
    """Adds what browsers must keep to (ASGI)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        await self.app(scope, receive, with_headers)


def make_page(service: Service) -> gr.Blocks:
    """The page with its tabs."""
    with gr.Blocks(title="medvl", analytics_enabled=False) as page:
        gr.HTML(html.block(html.tag("h1", "medvl"), html.tag("p", html.NOTICE, kind="notice")))
        about = gr.HTML(elem_id="about")
        choices = []  # dropdowns of adapters
        with gr.Tab("Extract"):
            choices.append(ui_tabs.extract_tab(service))
        with gr.Tab("Analyse"):
            choices.append(ui_tabs.analyse_tab(service))
        with gr.Tab("CT findings"):
            ui_tabs.ct_tab(service)
        with gr.Tab("Slides"):
            ui_tabs.slides_tab(service)
        with gr.Tab("Ask and draw"):
            models = ui_tabs.ask_tab(service)
        with gr.Tab("Adapters"):
            choices.append(ui_tabs.adapters_tab(service))
        with gr.Tab("Benchmarks"):
            ui_tabs.benchmarks_tab(service)

        def load() -> tuple[Any, ...]:
            message, names, answering = _look_at(service)
            dropdowns = [gr.Dropdown(choices=["", *names]) for _ in choices]
            return message, *dropdowns, gr.Dropdown(choices=answering, value=(answering or [""])[0])

        page.load(load, None, [about, *choices, models], api_visibility="private")

        def forget(request: gr.Request) -> None:
            """Drop files and conversation of a user who closes the page; gradio would keep them for an hour."""
            page.state_holder.delete_state(request.session_hash)

        page.unload(forget)
    return page


def _look_at(service: Service) -> tuple[str, list[str], list[str]]:
    """(what is served, adapters by name, what "Ask and draw" may ask)."""
    try:
        health = service.get("/health")
    except Unanswered as e:
        return html.fault(str(e)), [], []
    try:
        names = [entry["id"] for entry in service.get("/v1/models")["data"]]
    except Unanswered:
        names = []
    parts = [f"Service {health['version']}, {health['status']}"]
    if health["model"]:
        model = health["processes"].get("model", {})  # none where the engine is elsewhere
        facts = [model[name] for name in ("dtype", "device") if name in model]
        parts.append(" ".join(["model", health["model"], *facts]))
    unified = []
    for name, facts in health["processes"].items():
        if "run" in facts:
            parts.append(f"{name}: {facts['run']}")
            unified += [parts[-1]] if name == "unified" else []
    return html.block(html.tag("p", "; ".join(parts))), names, unified + names


def _remove_left_files(folder: Path) -> None:
    """Again and again remove uploads that were broken off."""
    while True:
        for path in folder.rglob("*"):
            try:
                if path.is_file() and time.time() - path.stat().st_mtime > _LEFT_S:
                    path.unlink()
            except OSError:
                continue  # taken meanwhile
        time.sleep(_LEFT_S / 4)
