"""What a trial showed is told in a line, and is read back from its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard.record.files import read_file
from lightning_nanguard.record.fit_log import FitLog
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.trials import TRIALS_FILE, HeldTrial, trials_in_words

NOTHING = HeldTrial(40, 104, "stuck_loss", "not confirmed")
SHOWN = HeldTrial(80, 144, "stuck_loss", "confirmed", 0.62, 1 / 64)
ENDED = HeldTrial(200, 210, "climbing\x1b[2J", "no result", reason="the run ended first")


def test_each_outcome_in_one_line() -> None:
    """Steps, suspicion, what was seen, and that nothing was changed; no control character."""
    assert NOTHING.told() == (
        "trial of steps 40 to 104 (stuck loss): no restart at a lower learning rate was clearly ahead; nothing was "
        "changed"
    )
    assert SHOWN.told().endswith(
        "a restart at 0.0156 times the learning rate was clearly ahead; the run lacked 62% of what it could learn"
    )
    assert ENDED.told() == (
        "trial of steps 200 to 210 (climbing\\x1b[2J): it ended without a result, because the run ended first; nothing "
        "was changed"
    )


def test_all_in_a_few_words() -> None:
    """How many, from when to when, and how many had which outcome, with the reason if there is none."""
    assert trials_in_words([]) == ""
    assert trials_in_words([NOTHING, NOTHING]) == (
        "2 trials held (steps 40 to 104), which confirmed nothing and changed nothing"
    )
    assert trials_in_words([ENDED, ENDED]) == (
        "2 trials held (steps 200 to 210), which ended without a result (the run ended first) and changed nothing"
    )
    assert trials_in_words([NOTHING, ENDED]) == (
        "2 trials held (steps 40 to 210), of which 1 confirmed nothing, 1 ended without a result (the run ended first)"
    )
    assert trials_in_words([NOTHING, SHOWN]) == (
        "2 trials held (steps 40 to 144), of which 1 confirmed the suspicion, 1 confirmed nothing; the others changed "
        "nothing"
    )
    assert trials_in_words([SHOWN]).endswith("of which 1 confirmed the suspicion")


def test_read_back(tmp_path: Path) -> None:
    """What is read equals what was given; what is no trial is refused with the reason."""
    log: FitLog[HeldTrial] = FitLog(HeldTrial.told, JsonLines(tmp_path / TRIALS_FILE), "a-run")
    for one in (NOTHING, SHOWN, ENDED):
        log.give(one)
    log.close()
    assert read_file(tmp_path / TRIALS_FILE, HeldTrial.from_dict) == [NOTHING, SHOWN, ENDED] == log.given
    assert {one.run for one in read_file(tmp_path / TRIALS_FILE, HeldTrial.from_dict)} == {"a-run"}
    with pytest.raises(ValueError, match="its outcome is 'perhaps'"):
        HeldTrial.from_dict({**NOTHING.to_dict(), "outcome": "perhaps"})
    with pytest.raises(ValueError, match="not a trial: "):
        HeldTrial.from_dict({"begun_step": 1})
