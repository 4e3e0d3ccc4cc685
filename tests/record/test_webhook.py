"""Interventions reach a webhook, tried against a local server."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from lightning_nanguard import NaNGuard, Webhook
from lightning_nanguard.record.base import RunInfo
from tests.helpers import fit, task, with_bad
from tests.record.data import SKIP


class Server(HTTPServer):
    """Keeps what is posted to it, and answers with its status."""

    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.posts: list[tuple[str, dict[str, str]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/services/secret"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((str(self.headers["Content-Type"]), json.loads(body)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_run_is_told(server: Server, tmp_path: Path) -> None:
    """What a run is saved from is posted as Slack takes it, and training does not wait for it."""
    guard = NaNGuard(sinks=[Webhook(server.url)])
    fit(task(), with_bad(4, count=8), guard, folder=tmp_path)
    ((kind, body),) = server.posts
    assert kind == "application/json"
    assert set(body) == {"text"}
    assert body["text"].startswith(f"NaNGuard, run {guard.run_id}: step ")
    assert "done: skipped the batch" in body["text"]


def test_rarely_and_without_markup(server: Server) -> None:
    """Of one kind the 1st, 2nd, 4th, 8th … are posted, a stop always; a name cannot call a channel."""
    sink = Webhook(server.url, name="mine")
    sink.open(RunInfo(run_id="20261128"))
    for _ in range(9):
        sink.write(replace(SKIP, place="<!channel> & more"))
    sink.write(replace(SKIP, remedies=("stop",)))
    sink.write(replace(SKIP, remedies=("stop",)))
    sink.write(replace(SKIP, remedies=("stop",), applied=False))
    texts = [body["text"] for _, body in server.posts]
    assert len(texts) == 4 + 2
    assert "NaNGuard, run mine: " in texts[0]
    assert "&lt;!channel&gt; &amp; more" in texts[0]
    assert texts[3].endswith("(8 so far)")


def test_a_server_that_refuses_costs_nothing(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run ends as it should, the log names the sink, and nothing that is logged has the address."""
    server.status = 500
    fit(task(), with_bad(4, count=8), NaNGuard(sinks=[Webhook(server.url)]), folder=tmp_path)
    assert "Webhook" in caplog.text
    assert "500" in caplog.text
    assert "secret" not in caplog.text


def test_arguments() -> None:
    """An address that is none is refused and not shown; a copy posts to the same place."""
    for url in ("hooks.example.org/secret", "file:///etc/secret", ""):
        with pytest.raises(ValueError, match="an address that begins with https://") as raised:
            Webhook(url)
        assert "secret" not in str(raised.value)
    with pytest.raises(ValueError, match="a number of seconds above 0"):
        Webhook("https://example.org/x", timeout=0)
    sink = pickle.loads(pickle.dumps(Webhook("https://example.org/secret", 3.0, "mine")))
    assert repr(sink) == "Webhook('https://example.org/…')"
    assert vars(sink)["_url"] == "https://example.org/secret"
