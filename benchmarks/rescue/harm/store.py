"""Keeps what was measured, a draw a line, so that a thousand draws can be gathered over several runs.

The name of a file holds a hash of everything that settles a result: figures of another version never mix with these,
and a run that was interrupted goes on where it ended. Comments, docstrings and layout do not count as another version.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import benchmarks
import lightning_nanguard
from benchmarks.rescue.measuring import REGAINED

from .judging import is_harmed

RESULTS = Path("benchmarks/results/harm")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one draw under one contender.

    Attributes:
        case: Form and seed.
        contender: ``"bare"``, ``"certain"``, ``"evidence"`` or a rival.
        healthy: Whether the bare run was healthy; if not, the draw is set aside and only the bare run is kept.
        identical: Whether the end is the bare run's to the last bit.
        interventions: How often it stepped in.
        acts: What it did, the first dozen: step, fault, remedies.
        repeated: Calls of ``training_step`` beyond those of the bare run.
        error: What ended the run, if anything did.
        ended: Whether the run came to its end with finite tensors.
        initial: Held-out loss of the untrained model.
        bare: Held-out loss of the bare run.
        final: Held-out loss in the end.
        twins: Held-out losses of reseeded bare runs; only of touched runs.
        lower: Held-out losses of bare runs at lower rates that came to a finite end; only of bare and touched runs.
        harmed: Whether it ended worse than the bare run by more than chance does.
        time: Processor time over the bare run's.
    """

    case: str
    contender: str
    healthy: bool
    identical: bool = True
    interventions: int = 0
    acts: list[list[Any]] = field(default_factory=list)
    repeated: int = 0
    error: str | None = None
    ended: bool = True
    initial: float = 0.0
    bare: float = 0.0
    final: float = 0.0
    twins: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    harmed: bool = False
    time: float = 1.0

    @property
    def touched(self) -> bool:
        """Whether anything was done, or anything in the end differs by a bit."""
        return self.interventions > 0 or not self.identical

    @property
    def improved(self) -> bool:
        """Whether a touched run ended better than the bare run by more than chance does."""
        return self.touched and self.ended and self._is_better(self.final)

    @property
    def better_at_lower_rate(self) -> bool:
        """Whether a whole bare run at a lower rate ends better than this one by more than chance does."""
        return any(map(self._is_better, self.lower))

    @property
    def regains(self) -> bool:
        """Whether a bare run gains as much as a rescued run has to regain, of what it gains at the best lower rate."""
        best = min((self.bare, *self.lower))
        return self.initial - self.bare >= REGAINED * (self.initial - best)

    def _is_better(self, loss: float) -> bool:
        # Beside a run with this loss the bare run would count as harmed.
        return is_harmed(self.bare, True, self.initial, loss, self.twins)

    @property
    def form(self) -> str:
        """Name of the form."""
        return self.case.rpartition("#")[0]

    @property
    def kind(self) -> str:
        """Group in the report."""
        return self.case.partition(":")[0]


class Store:
    """One file of outcomes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                if line.endswith("}"):  # a run that was killed may leave half a line
                    outcome = Outcome(**json.loads(line))
                    self.outcomes[outcome.case, outcome.contender] = outcome

    def missing(self, case: str, contenders: Iterable[str]) -> tuple[str, ...]:
        """The contenders that have not been put to a case; none where its bare run is not healthy."""
        bare = self.outcomes.get((case, "bare"))
        if bare is not None and not bare.healthy:
            return ()
        return tuple(name for name in contenders if (case, name) not in self.outcomes)

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Keep outcomes, at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a") as file:
            for outcome in outcomes:
                self.outcomes[outcome.case, outcome.contender] = outcome
                file.write("\n" * torn + json.dumps(_brief(outcome)) + "\n")
                torn = False


def _brief(outcome: Outcome) -> dict[str, Any]:
    """What differs from an untouched run, with six digits a loss."""
    default = asdict(Outcome(outcome.case, outcome.contender, outcome.healthy))
    named = ("case", "contender", "healthy")
    kept = {key: value for key, value in asdict(outcome).items() if key in named or value != default[key]}
    return {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in kept.items()}


def store_for(seeds: str, folder: Path = RESULTS, *, rivals: bool = False) -> Store:
    """The file of a set of seeds under the code as it is now; the rivals' does not depend on the package."""
    label = f"{seeds}-rivals" if rivals else seeds
    return Store(folder / f"{label}-{version(package=not rivals)}.jsonl")


def version(*, package: bool = True) -> str:
    """Hash of what draws, trains and judges the runs, and of the package."""
    rescue = Path(benchmarks.__path__[0]) / "rescue"
    names = ("cases", "data", "models", "optimizers", "rates", "running", "contenders", "harm/judging",
             "harm/measuring", "healthy/*", "realistic/*")  # fmt: skip
    files = [file for name in names for file in rescue.glob(f"{name}.py")]
    if package:
        files += Path(lightning_nanguard.__path__[0]).rglob("*.py")
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.parent.name}/{file.name}".encode() + code_of(file.read_text()).encode())
    return digest.hexdigest()[:12]


def code_of(source: str) -> str:
    """The code of a module without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return ast.dump(tree)
