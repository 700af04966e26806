"""`invoke ui`: the page to look at a service, in an environment of its own. Nothing here needs torch or cattrs."""

import os
import signal
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

_MEMORY = Path("/dev/shm")  # files in memory, on Linux
_KEY = "MEDVL_KEY"


def serve_page(
    api: str = "http://127.0.0.1:8000", host: str = "127.0.0.1", port: int = 7860, key_env: str = _KEY
) -> None:
    """Serve the page until the process is told to stop.

    Args:
        api: address of the service.
        key_env: name of the environment variable that holds the service's key; the usual one may be empty.
    Raises:
        ValueError: no such address or variable, an address in use, gradio is missing.
    """
    if urlsplit(api).scheme not in ("http", "https") or not urlsplit(api).hostname:
        raise ValueError(f"ui: --api must be an address such as http://127.0.0.1:8000, got {api!r}")
    key = os.environ.get(key_env, "")
    if not key and key_env != _KEY:
        raise ValueError(f"ui: the environment variable {key_env} has no key in it")
    # SIGTERM ends it as Ctrl-C does, so that the folder of uploads is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(
        dir=_MEMORY if _MEMORY.is_dir() else None, prefix=f"medvl-ui-{os.getpid()}-"
    ) as folder:
        # Before gradio is imported, which reads them then.
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": folder,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",  # gradio asks itself whether it is there
        }
        try:
            from medvl.serve import ui
            from medvl.serve.ui_client import Service
        except ImportError as e:
            raise ValueError(
                f"ui: needs an environment with gradio: pip install 'gradio>=6' httpx attrs invoke tqdm ({e.name} is "
                "missing)"
            ) from e
        ui.serve_page(Service(address=api, key=key), host, port, folder)
