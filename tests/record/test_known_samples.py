"""How often bad samples were met is counted, and goes on in a resumed run."""

from __future__ import annotations

from lightning_nanguard.record.known_samples import KnownSamples


def test_counts_and_leaves_out() -> None:
    """Each sample is counted by its row or hash; with quarantine it is left out from then on."""
    known = KnownSamples(quarantine=True)
    assert [known.met(7), known.met("hash ab"), known.met(7), known.times(7), known.times(8)] == [1, 1, 2, 2, 0]
    assert (known.left_out, known.hashes) == ({7}, {"ab"})
    assert KnownSamples().met(7) == 1


def test_state_goes_on() -> None:
    """A resumed run counts on, and leaves out what its first part met where it is asked to."""
    known = KnownSamples()
    known.met(7)
    known.met("cat.png")
    resumed, plain = KnownSamples(quarantine=True), KnownSamples()
    for one in (resumed, plain):
        one.load_state_dict(known.state_dict())
        assert one.met(7) == 2
    assert resumed.left_out == {7, "cat.png"}
    assert plain.left_out == set()
    resumed.load_state_dict({})
    assert resumed.times(7) == 2
