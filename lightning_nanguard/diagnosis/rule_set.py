"""The rules of one guard: the built-in ones and the user's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

from lightning_nanguard.diagnosis.case import Case
from lightning_nanguard.diagnosis.rules import RULES
from lightning_nanguard.errors import takes_one_argument
from lightning_nanguard.record.text import name_of
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Finding

_logger = logging.getLogger("lightning_nanguard")

Rule = Callable[[Case], Finding | None]
"""A rule of a user's own: a pure function of a case."""


@final
class RuleSet:
    """Asks the built-in rules and the user's own for the causes of a case.

    If a rule of the user raises, or returns anything but a finding or ``None``, this is logged once with its name. The
    rule is asked again in the next case.

    Args:
        own: The user's rules, see :func:`check_rules`. At equal confidence their findings come first.
        thresholds: When a number is evidence for a cause, for the built-in rules.
    """

    def __init__(self, own: Sequence[Rule] = (), thresholds: DiagnosisThresholds = DEFAULT) -> None:
        self._own = tuple(own)
        self._thresholds = thresholds
        self._logged: set[int] = set()

    def findings(self, case: Case) -> tuple[Finding, ...]:
        """All findings, those with the highest confidence first; ties in the order of the rules."""
        own = (self._ask(index, case) for index in range(len(self._own)))
        built_in = (rule(case, self._thresholds) for rule in RULES)
        found = [finding for finding in (*own, *built_in) if finding is not None]
        return tuple(sorted(found, key=lambda finding: -finding.confidence))

    def diagnose(self, case: Case) -> Finding | None:
        """The finding with the highest confidence; ``None`` if no rule has one.

        Example:
            >>> from lightning_nanguard.types import Evidence, Fault
            >>> case = Case(Fault("non_finite_loss", "batch", "loss"), Evidence(step=3, batch_finite=False))
            >>> RuleSet().diagnose(case).cause
            'non_finite_input'
        """
        return next(iter(self.findings(case)), None)

    def _ask(self, index: int, case: Case) -> Finding | None:
        rule = self._own[index]
        try:
            found = rule(case)
            wrong = None if found is None else _what_is_wrong(found)
        except Exception as error:
            wrong = f"raised {type(error).__name__}: {error}"
            found = None
        if wrong is None:
            return found
        if index not in self._logged:
            self._logged.add(index)
            _logger.error(
                "NaNGuard: the diagnosis rule %s %s. A rule takes a Case and returns a Finding or None. The guard "
                "ignores this result, asks the other rules as usual, and says this once.",
                rule_name(rule),
                wrong,
            )
        return None


def _what_is_wrong(found: object) -> str | None:
    """Why a rule's result is not a valid finding; ``None`` if it is."""
    if not isinstance(found, Finding):
        return f"returned {type(found).__name__} {found!r}"
    confidence: Any = found.confidence
    if not isinstance(confidence, (int, float)) or not 0 <= confidence <= 1:
        return f"returned a finding with confidence={confidence!r}, expected a number from 0 to 1"
    for name in ("cause", "place", "suggestion"):
        if not isinstance(getattr(found, name), str):
            return f"returned a finding with {name}={getattr(found, name)!r}, expected a string"
    evidence: Mapping[Any, Any] = found.evidence
    for key, value in evidence.items():
        if not isinstance(key, str) or not isinstance(value, (int, float, str)):
            return f"returned a finding with evidence[{key!r}] of {type(value).__name__}, expected a number or a string"
    if not all(isinstance(sample, int) for sample in found.samples):
        return f"returned a finding with samples={found.samples!r}, expected indices"
    return None


def rule_name(rule: Callable[..., Any]) -> str:
    """Name of a rule in messages: that of the function, or of the class of a callable object."""
    return name_of(rule.func if isinstance(rule, partial) else rule)


def check_rules(rules: Sequence[Rule] | None) -> tuple[Rule, ...]:
    """Check the rules that were given to ``NaNGuard``, and return them.

    Raises:
        TypeError: If one is not a rule. The message names it.
    """
    listed: Any = () if rules is None else rules
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Sequence):
        raise TypeError(f"NaNGuard(rules={rules!r}): expected a list of functions that take a Case.")
    for given in listed:
        if isinstance(given, type):
            raise TypeError(f"NaNGuard(rules=…): {given!r} is a class; write {given.__name__}().")
        if not callable(given):
            raise TypeError(f"NaNGuard(rules=…): {given!r} is not callable; a rule takes a Case and returns a Finding.")
        if not takes_one_argument(given):
            raise TypeError(f"NaNGuard(rules=…): {rule_name(given)} cannot be called with one argument, the Case.")
    return tuple(listed)
