"""Where the guard keeps snapshots of models of common sizes, computed by the code that decides it in a run.

``python -m benchmarks.snapshot_places`` prints the table of docs/devices.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_nanguard.state.device import DeviceMemory, pinned_bytes
from lightning_nanguard.state.snapshot_room import DevicePeaks, Place, Room, SnapshotSize, choose_place
from lightning_nanguard.thresholds.snapshots import PlacementThresholds

GB = 10**9
CARD = torch.device("cuda", 0)
ACTIVATIONS = 0.6, 0.95
"""Shares of the memory beside weights, gradients and moments that activations take at their peak."""


def gpt2(layers: int, width: int) -> list[int]:
    """Numbers of elements of the parameters of a GPT-2."""
    block = [width] * 4 + [3 * width * width, 3 * width, width * width, width]
    block += [4 * width * width, 4 * width, 4 * width * width, width]
    return [50257 * width, 1024 * width, *(block * layers), width, width]


def llama(layers: int, width: int, hidden: int, words: int) -> list[int]:
    """The same of a Llama without shared keys and values."""
    block = [width] * 2 + [width * width] * 4 + [width * hidden] * 3
    return [words * width, words * width, *(block * layers), width]


MODELS = {
    "GPT-2 124M, 32 bits": (gpt2(12, 768), 4),
    "GPT-2 1.5B, 32 bits": (gpt2(48, 1600), 4),
    "Llama 7B, 16 bits": (llama(32, 4096, 11008, 32000), 2),
}


def snapshot_size(elements: list[int], width: int) -> SnapshotSize:
    """What one snapshot of weights and Adam's two moments takes."""
    tensors = [count * width for count in elements] * 3
    return SnapshotSize({CARD: sum(tensors)}, in_host=sum(map(pinned_bytes, tensors)))


def place(
    one: SnapshotSize, card: int, host: int, processes: int, activations: float, limits: PlacementThresholds
) -> Place:
    """Where snapshots lie that take ``one`` each.

    Args:
        one: Bytes of one snapshot.
        card: Bytes of the card.
        host: Bytes of the host, of which nine tenths are available.
        processes: Processes on the host, each with a card of its own and one and the same model.
        activations: Share of the rest of the card that activations take.
        limits: What is left free.
    """
    state = one.beside[CARD] * 4 // 3  # gradients are as large as weights
    if state > card:
        return Place(False, -1)
    peak = int(state + activations * (card - state))
    room = DevicePeaks(limits).room(CARD, DeviceMemory(card, card - peak, peak, peak), held=0)
    available = 0.9 * host * (1 - limits.host_reserve) / processes
    # Processes with the same model keep a certified snapshot together.
    return choose_place(one, Room({CARD: room}, available, parts=processes), 3)


def words(found: Place) -> str:
    """A place in words."""
    if found.certified < 0:
        return "–"
    if found.certified == 0:
        return "none"
    return f"{found.certified + 1} on the card" if found.beside else f"{found.certified + 1} in the host"


def rows() -> Iterator[str]:
    """The rows of the table."""
    limits = PlacementThresholds()
    hosts = [(host, processes) for processes in (1, 8) for host in (128, 512)]
    yield (
        "| model | one snapshot; pinned | card | activations | "
        + " | ".join(f"{processes} process{'es' if processes > 1 else ''}, {host} GB" for host, processes in hosts)
        + " |"
    )
    yield "|---|---|---|---|" + "---|" * len(hosts)
    for name, (elements, width) in MODELS.items():
        one = snapshot_size(elements, width)
        for card in (80, 141):
            for share in ACTIVATIONS:
                places = [place(one, card * GB, host * GB, count, share, limits) for host, count in hosts]
                sizes = f"{one.beside[CARD] / GB:.3g} GB; {one.in_host / GB:.3g} GB"
                yield f"| {name} | {sizes} | {card} GB | {share:.0%} | " + " | ".join(map(words, places)) + " |"


def table() -> str:
    """The table in Markdown."""
    return "\n".join(rows())


if __name__ == "__main__":
    print(table())
