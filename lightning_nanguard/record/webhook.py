"""A sink that posts interventions to a webhook, such as Slack's."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from typing import Any, final
from urllib.parse import urlsplit

from lightning_nanguard.errors import require
from lightning_nanguard.record.base import RunInfo, Sink
from lightning_nanguard.record.messages import tell, tell_again
from lightning_nanguard.types import Intervention


@final
class Webhook(Sink):
    """Posts interventions as ``{"text": …}`` to an address, as Slack, Mattermost and many others take it.

    The first of a kind is told in full, its 2nd, 4th, 8th … in one line, and one that stops the run always. It is
    called from a thread of its own: training does not wait for the network, and is not harmed where no answer comes.

    Args:
        url: The address. Whoever knows it can post there: it is shown neither in messages nor in records.
        timeout: Seconds that a post may take.
        name: How the run is called in the messages; its id where it is empty.

    Raises:
        ValueError: When the address is none, or the timeout is not above 0.

    Example:
        >>> Webhook("https://hooks.example.org/services/T0/B0")
        Webhook('https://hooks.example.org/…')
    """

    def __init__(self, url: str, timeout: float = 10.0, name: str = "") -> None:
        parts = urlsplit(str(url))
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        require(valid, "Webhook", "url", f"{parts.scheme}://…", "an address that begins with https:// or http://")
        require(timeout > 0, "Webhook", "timeout", timeout, "a number of seconds above 0")
        self._url = url
        self._shown = f"{parts.scheme}://{parts.hostname}/…"
        self.timeout = timeout
        self._name = name
        self._run = name
        self._seen: Counter[tuple[str, str | None, tuple[str, ...]]] = Counter()

    def open(self, run: RunInfo) -> None:
        """Take the name of the run."""
        self._run = self._name or run.run_id
        self._seen.clear()

    def write(self, intervention: Intervention) -> None:
        """Post the intervention, or count it."""
        kind = (intervention.fault, intervention.cause, intervention.remedies)
        self._seen[kind] += 1
        seen = self._seen[kind]
        if seen == 1 or intervention.ends_run:
            self._post(tell(intervention))
        elif seen & (seen - 1) == 0:
            self._post(f"{tell_again(intervention)} ({seen:,} so far)")

    def _post(self, words: str) -> None:
        # Slack takes markup and names of channels from between these.
        text = f"NaNGuard, run {self._run}: {words}".replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        body = json.dumps({"text": text}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            answer.read(0)

    def __repr__(self) -> str:
        return f"Webhook({self._shown!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._url, self.timeout, self._name)
