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
from lightning_nanguard.types import Intervention, Kind


@final
class Webhook(Sink):
    """Posts interventions as ``{"text": …}`` to an address, in the format of Slack, Mattermost and others.

    It posts the first of a kind in full, the 2nd, 4th, 8th … in one line each, and always one that stops the run. It is
    called from a separate thread, so training does not wait for the network.

    Args:
        url: The address. It is shown neither in messages nor in records, because anybody who knows it can post there.
        timeout: Seconds that a post may take.
        name: Name of the run in the messages; if empty, its id.

    Raises:
        ValueError: If the address is not valid, or the timeout is not above 0.

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
        self._seen: Counter[Kind] = Counter()

    def open(self, run: RunInfo) -> None:
        """Use the id of the run as its name, if none was given."""
        self._run = self._name or run.run_id
        self._seen.clear()

    def write(self, intervention: Intervention) -> None:
        """Post the intervention, or count it."""
        self._seen[intervention.kind] += 1
        seen = self._seen[intervention.kind]
        if seen == 1 or intervention.ends_run:
            self._post(tell(intervention))
        elif seen & (seen - 1) == 0:
            self._post(f"{tell_again(intervention)} ({seen:,} so far)")

    def _post(self, words: str) -> None:
        # Slack interprets markup and channel names between < and >.
        text = f"NaNGuard, run {self._run}: {words}".replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        body = json.dumps({"text": text}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            answer.read(0)

    def __repr__(self) -> str:
        return f"Webhook({self._shown!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._url, self.timeout, self._name)
