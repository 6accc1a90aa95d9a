"""A run's page while the run goes on: served to this machine's browser, and made anew when it changes."""

import html
import secrets
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flower_split.errors import FlowerSplitError
from flower_split.results.report.page import drawing, page_of
from flower_split.results.report.rows import read_runs
from flower_split.runs.metrics import FILE

_HOST = "127.0.0.1"
_SHOWN = ("config.json", FILE, "summary.json")  # whose change is a change of the page
_RELOAD = """<script>
setInterval(async () => {{
  try {{
    const answer = await fetch("version", {{ cache: "no-store" }});
    if (answer.ok && (await answer.text()) !== "{version}") location.reload();
  }} catch {{ document.title = "(ended) " + document.title.replace("(ended) ", ""); }}
}}, {milliseconds});
</script>
"""


class LivePage:
    """The page about runs, as they are now. Thread-safe.

    Args:
        runs: Run directories; the first is what the others are compared with.
        seconds: From one look of the browser to the next.

    Raises:
        ConfigError: The extra ``report`` is not installed.
        RunDirectoryError: One is no run directory.
    """

    def __init__(self, runs: Sequence[Path], seconds: float) -> None:
        read_runs(runs)
        self._runs, self._seconds = tuple(runs), seconds
        self._drawing = drawing()
        self._served = secrets.token_hex(4)  # another server's page is another version
        self._lock = threading.Lock()  # guards the two below
        self._version, self._text = "", ""

    def version(self) -> str:
        """Return what changes when a file changes that the page shows."""
        sizes = [
            str((run / name).stat().st_size) if (run / name).exists() else "-"
            for run in self._runs
            for name in _SHOWN
        ]
        return "-".join([self._served, *sizes])

    def text(self) -> str:
        """Return the page; a file that is damaged just now is said in its place."""
        version = self.version()  # before reading: what comes meanwhile is another version
        with self._lock:
            if version != self._version:
                self._version, self._text = version, self._made(version)
            return self._text

    def _made(self, version: str) -> str:
        reload = _RELOAD.format(version=version, milliseconds=int(self._seconds * 1000))
        try:
            page = page_of(read_runs(self._runs), self._drawing)
        except FlowerSplitError as error:
            page = f"<!doctype html>\n<html><body><p>{html.escape(str(error))}</p></body></html>\n"
        head, body, tail = page.rpartition("</body>")
        return head + reload + body + tail


class PageServer(ThreadingHTTPServer):
    """Serves one page on loopback; :attr:`address` is what a browser opens.

    Args:
        page: The page.
        port: To listen on; 0: any free one.

    Raises:
        OSError: The port cannot be had.
    """

    daemon_threads = True

    def __init__(self, page: LivePage, port: int = 0) -> None:
        super().__init__((_HOST, port), _Handler)
        self.page = page

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://{_HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        """Answer with the page or its version."""
        here = (f"{_HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}")
        if (
            self.headers.get("Host") not in here
        ):  # a page of elsewhere, under a name that leads here
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._send(self.server.page.text(), "text/html; charset=utf-8")
        elif self.path == "/version":
            self._send(self.server.page.version(), "text/plain; charset=utf-8")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal shows the address."""
