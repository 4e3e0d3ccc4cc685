"""Whether receipts are right: ``python -m benchmarks.rescue.receipts``.

Each intervention is compared twice. The guard's receipt compares 21 to 128 updates later, on training batches. The
truth is the held-out loss at the end of the whole run with the intervention, against that of the whole run without it.
Half of the interventions are forced on healthy runs: a cut of the rate, with or without a rollback to the start, at a
random update. The others are the guard's own, in runs whose rate is too high.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl

from lightning_nanguard import NaNGuard
from lightning_nanguard.decide.receipt import Judged, judge_receipt
from lightning_nanguard.state.restore import restore
from lightning_nanguard.types import Trial

from .cases import FAILING, Case, Form
from .healthy import DRAWN
from .running import train

FACTORS = (1 / 4, 1 / 16, 1 / 64, 1 / 256)
_ITS_OWN = "its own"
CLEAR = 0.05
"""Share of what the better one of two runs has learned, by which two ends must differ to be different."""


@dataclass(frozen=True)
class Compared:
    """One intervention.

    Attributes:
        case: The run.
        what: What was done.
        verdict: What the receipt says.
        truth: What the two whole runs say.
        share: By how much the run with the intervention ended better, as a share of what the better one learned.
    """

    case: str
    what: str
    verdict: str
    truth: str
    share: float


class _Force(pl.Callback):
    """Makes one intervention that nothing asks for."""

    def __init__(self, guard: NaNGuard, at: int, factor: float, *, back: bool) -> None:
        self.guard, self.at, self.factor, self.back = guard, at, factor, back

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        fit = self.guard._fit
        if fit is None or fit.guard.updates != self.at:
            return
        context = fit.guard.context
        fit.guard._parts.beside.receipts.before(trainer.global_step, skipped=False)
        if self.back:
            restore(context.learner, context.ring.certified[-1])
        context.rate.set_multiplier(self.factor)


@contextmanager
def _nothing_taken_back() -> Iterator[None]:
    """Inside, receipts are written and the run goes on as it is, so that its end shows what the intervention did."""

    def judge(*arguments: Any) -> Judged:
        return judge_receipt(*arguments)._replace(take_back=False)

    with patch("lightning_nanguard.guard.receipts.judge_receipt", judge):
        yield


def forced(case: Case, dice: random.Random) -> Compared | None:
    """A healthy run with an intervention that nothing asks for; ``None`` where it had no receipt."""
    guard = NaNGuard(act_on="evidence")
    factor, back = dice.choice(FACTORS), dice.random() < 0.5
    at = dice.randint(24, max(25, case.steps // 3))
    no_trial_acts = patch("lightning_nanguard.guard.trial.judge_trial", lambda *_: Trial())
    with _nothing_taken_back(), no_trial_acts:
        run = train(case, [_Force(guard, at, factor, back=back), guard])
    what = f"rate times {factor:.3g}{', back to the start' if back else ''} at {at}"
    return _compared(case, what, guard, run.final)


def its_own(case: Case) -> Compared | None:
    """The guard's first own intervention in a run; ``None`` where it made none on finite evidence."""
    guard = NaNGuard(act_on="evidence")
    with _nothing_taken_back():
        run = train(case, [guard])
    return _compared(case, _ITS_OWN, guard, run.final)


def _compared(case: Case, what: str, guard: NaNGuard, final: float) -> Compared | None:
    measured = [receipt for receipt in guard.receipts if receipt.verdict != "not measured"]
    if not measured:
        return None
    bare = train(case)
    if what != _ITS_OWN and not math.isfinite(bare.final):
        return None  # it is not healthy by itself
    ends = [end if math.isfinite(end) else math.inf for end in (final, bare.final)]
    learned = bare.initial - min(ends)
    share = (ends[1] - ends[0]) / learned if learned > 0 and math.isfinite(ends[0]) else -math.inf
    truth = "gained" if share > CLEAR else "cost" if share < -CLEAR else "no difference"
    return Compared(case.name, what, measured[0].verdict, truth, share)


def _draws(forms: list[Form], first: int, dice: random.Random) -> Iterator[Case]:
    seed = first
    while True:
        yield dice.choice(forms).draw(seed)
        seed += 1


def gather(count: int, first: int) -> Iterator[Compared]:
    """Interventions, one after another: forced on healthy runs and the guard's own by turns."""
    dice = random.Random(first)
    healthy = _draws([form for form in DRAWN if not form.name.startswith("noise")], first, dice)
    failing = _draws([form for form in FAILING if form.name.startswith("rate")], first, dice)
    found = 0
    while found < count:
        one = forced(next(healthy), dice) if found % 2 == 0 else its_own(next(failing))
        if one is not None:
            found += 1
            yield one


def agrees(one: Compared) -> bool:
    """Whether the receipt says what the whole runs say, or that it makes no difference where one is small."""
    return one.verdict == one.truth or (one.verdict == "no difference" and abs(one.share) < 2 * CLEAR)


def main(argv: list[str] | None = None) -> int:
    """Compare, show, write."""
    parser = argparse.ArgumentParser("python -m benchmarks.rescue.receipts", description="Whether receipts are right.")
    parser.add_argument("--draws", type=int, default=100, help="interventions (default: 100)")
    parser.add_argument("--seed", type=int, default=505_000, help="first seed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/receipts.json"), metavar="JSON")
    arguments = parser.parse_args(argv)
    found: list[Compared] = []
    for one in gather(arguments.draws, arguments.seed):
        found.append(one)
        mark = " " if agrees(one) else "!"
        print(f"{mark} {one.case:45} {one.what:45} {one.verdict:14} {one.truth:14} {one.share:+.3f}", flush=True)
    table = Counter((one.verdict, one.truth) for one in found)
    right = sum(map(agrees, found))
    opposite = sum({one.verdict, one.truth} == {"gained", "cost"} for one in found)
    for (verdict, truth), count in sorted(table.items()):
        print(f"receipt {verdict:14} whole run {truth:14} {count}")
    print(f"{right} of {len(found)} agree; {opposite} say the opposite")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"seed": arguments.seed, "agree": right, "opposite": opposite,
                                            "found": [asdict(one) for one in found]}, indent=1))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
