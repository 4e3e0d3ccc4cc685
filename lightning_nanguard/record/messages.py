"""Puts interventions, findings and advice into words, one line each.

Only this module and ``summary`` look at the words of remedies. A word they do not know, such as that of a remedy of the
user's own, is shown as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import Advice, Finding, Intervention


def describe(intervention: Intervention, thresholds: RecordsThresholds = RECORDS) -> str:
    """Say in one line when and where a fault was found, what was done, and why it happened.

    Args:
        intervention: What happened.
        thresholds: How many samples one message lists.

    Example:
        >>> describe(Intervention(412, 3, 12, "exploding_loss", "loss", ("restore", "scale"), 0.1, 0.05, 400))
        'step 412 (epoch 3, batch 12): exploding_loss in loss; went back to step 400, learning rate 0.1 → 0.05'
    """
    batch = f", batch {intervention.batch_idx}" if intervention.batch_idx >= 0 else ""
    place = f" in {intervention.place}" if intervention.place else ""
    if intervention.message:
        why = f" ({intervention.message.rstrip('. ')})"
    elif intervention.value is not None:
        why = f" ({intervention.value:.4g})"
    else:
        why = ""
    text = (
        f"step {intervention.global_step} (epoch {intervention.epoch}{batch}): {intervention.fault}{place}{why}; "
        f"{_done(intervention)}{_cause(intervention, thresholds)}"
    )
    # Names and messages of the user's may hold line breaks.
    return " ".join(text.split())


_PHRASES = {
    "skip": ("skipped the batch", "skipped the batch"),
    "restore": ("went back to {to}", "gone back to {to}"),
    "scale": ("learning rate {lr}", "changed the learning rate {lr}"),
    "clip": ("turned gradient clipping on", "turned gradient clipping on"),
    "reset moments": ("emptied the optimizer's state", "emptied the optimizer's state"),
    "undo": ("put back what the batch had touched", "put back what the batch had touched"),
    "resume": ("went on from another checkpoint", "gone on from another checkpoint"),
    "rewrite": ("wrote the last good state in its place", "written the last good state in its place"),
    "stop": ("stopped the run", "stopped the run"),
}


def _done(intervention: Intervention) -> str:
    applied, before, after = intervention.applied, intervention.lr_before, intervention.lr_after
    to = "an earlier state" if intervention.snapshot_step is None else f"step {intervention.snapshot_step}"
    if intervention.updates_lost:
        to += f" ({intervention.updates_lost} update{'s' * (intervention.updates_lost > 1)} lost)"
    known = before is not None and after is not None and before != after
    rate = f"{before:.4g} → {after:.4g}" if known else "changed" if applied else ""
    words = list(intervention.remedies)
    if known and "scale" not in words:
        # A remedy of the user's own may change the rate under another word.
        words.append("scale")
    parts = [_PHRASES[word][not applied].format(to=to, lr=rate).strip() if word in _PHRASES else word for word in words]
    text = ", ".join(parts) or ("did nothing" if applied else "done nothing")
    return text if applied else f"would have {text}"


def _cause(intervention: Intervention, thresholds: RecordsThresholds) -> str:
    finding = intervention.finding
    if finding is None:
        return f"; cause: {intervention.cause}" if intervention.cause else ""
    return f"; cause: {describe_finding(finding, thresholds=thresholds)}"


def describe_finding(finding: Finding, *, confidence: bool = False, thresholds: RecordsThresholds = RECORDS) -> str:
    """Say in one line what causes a fault, where, and what to do about it.

    Args:
        finding: The cause.
        confidence: Whether to add how sure it is.
        thresholds: How many samples the message lists.

    Example:
        >>> describe_finding(Finding("dead_relu", 0.9, place="net.1 (ReLU)", suggestion="Lower the learning rate."))
        'dead_relu in net.1 (ReLU): Lower the learning rate.'
    """
    place = f" in {finding.place}" if finding.place else ""
    samples = f" ({listed_numbers('sample', finding.samples, thresholds)})" if finding.samples else ""
    suggestion = f": {finding.suggestion}" if finding.suggestion else ""
    text = " ".join(f"{finding.cause}{place}{samples}{suggestion}".split())
    return f"{text} (confidence {finding.confidence:.2g})" if confidence else text


def describe_advice(advice: Advice, thresholds: RecordsThresholds = RECORDS) -> str:
    """Say in one line what was noticed, and when.

    Args:
        advice: What was noticed.
        thresholds: How many samples the message lists.

    Example:
        >>> describe_advice(Advice(0, 0, "preflight", Finding("dead_relu", 0.9, place="net.1 (ReLU)")))
        'step 0 (epoch 0), advice (preflight): dead_relu in net.1 (ReLU)'
    """
    where = f"step {advice.global_step} (epoch {advice.epoch}), advice ({advice.occasion})"
    return f"{where}: {describe_finding(advice.finding, thresholds=thresholds)}"


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """A number with its noun, such as ``"1 record"`` or ``"1,200 records"``."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def listed_numbers(noun: str, numbers: Sequence[int], thresholds: RecordsThresholds = RECORDS) -> str:
    """Numbers with their noun, such as ``"lines 2, 5, 7"``; what is too many is counted."""
    most = thresholds.numbers_per_message
    more = len(numbers) - most
    shown = ", ".join(str(number) for number in islice(numbers, most))
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}{f' and {more:,} more' if more > 0 else ''}"
