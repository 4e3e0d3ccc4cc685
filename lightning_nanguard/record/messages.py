"""Describes interventions, findings and advice in text that is safe to show, and chooses which interventions are shown.

Only this module and ``summary`` translate the words of remedies. An unknown word, such as that of the user's own
remedy, is shown unchanged.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import final

from lightning_nanguard.record.text import counted, in_words, listed_numbers, printable
from lightning_nanguard.types import SUSPICION, Advice, Finding, Intervention, Kind


def tell(intervention: Intervention) -> str:
    """Say in a few lines what happened, why, what was done, and what to do.

    Example:
        >>> finding = Finding("dead_relu", 0.9, place="net.1", suggestion="no unit is active. Lower the learning rate.")
        >>> print(tell(Intervention(7, 0, 7, "collapsed", "loss", ("skip",), 0.1, 0.1, finding=finding)))
        step 7 (epoch 0, batch 7): collapsed (loss)
          why: dead relu in net.1: no unit is active
          done: skipped the batch
          to do: Lower the learning rate.
    """
    kind = in_words(intervention.fault)
    place = f" ({intervention.place})" if intervention.place and intervention.place not in kind else ""
    what = intervention.message.rstrip(". ")
    if not what and intervention.value is not None:
        what = f"{intervention.value:.4g}"
    ranks = _ranks(intervention)
    lines = [f"{when(intervention)}: {kind}{place}{ranks}{f': {what}' if what else ''}"]
    finding, advice = intervention.finding, ""
    if finding is not None:
        reason, advice = _reason_and_advice(finding.suggestion)
        named = not finding.samples or "sample" in reason
        samples = "" if named else f" ({listed_numbers('sample', finding.samples)})"
        where = _where(finding)
        lines.append(f"why: {in_words(finding.cause)}{where}{samples}{f': {reason}' if reason else ''}")
        origin = origin_in_words(finding)
        lines += [f"sample{'s' * (len(finding.samples) > 1)}: {origin}"] if origin else []
    elif intervention.cause:
        lines.append(f"why: {in_words(intervention.cause)}")
    elif not intervention.applied and _AFTER_A_FAULT & set(intervention.remedies):
        lines.append("why: not known (with observe=True no batch is run again)")
    lines.append(f"done: {_done(intervention)}")
    if advice:
        lines.append(f"to do: {advice}{_rate_to_use(intervention)}")
    return "\n  ".join(map(printable, lines))


def _rate_to_use(intervention: Intervention) -> str:
    """The one rate that is proposed: that at which the run goes on, else the best one of a trial; empty without one."""
    before, after, finding = intervention.lr_before, intervention.lr_after, intervention.finding
    if finding is None or "lr" not in finding.evidence:
        return ""  # something else is to blame
    if before is None or after is None or not after < before:
        rate, factor = finding.evidence["lr"], finding.evidence.get("tried_rate_factor")
        if isinstance(rate, float) and isinstance(factor, float) and factor < 1:
            return f" A trial learned more at {rate * factor:.2g}."
        return ""
    largest = finding.evidence.get("largest_rate")
    if isinstance(largest, float) and after > largest:
        return f" This run goes on at {after:.4g}, and lowers the rate further if that is not enough."
    return f" This run goes on at {after:.4g}: use about this rate in the next one."


def tell_again(intervention: Intervention) -> str:
    """Say in one short line that a fault has come again.

    Example:
        >>> tell_again(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        'step 7 (epoch 0, batch 7): non-finite loss again; skipped the batch'
    """
    words = "" if intervention.finding is None else samples_in_words(intervention.finding)
    samples = f" ({words})" if words else ""
    ranks = "" if "on rank" in words else _ranks(intervention)
    again = f"{in_words(intervention.fault)}{ranks} again"
    return printable(f"{when(intervention)}: {again}{samples}; {_done(intervention)}")


def _ranks(intervention: Intervention) -> str:
    """The ranks that saw the fault; empty if all did."""
    return f" on {listed_numbers('rank', intervention.ranks)}" if intervention.ranks else ""


def when(intervention: Intervention) -> str:
    """Step, epoch and batch of an intervention."""
    batch = f", batch {intervention.batch_idx}" if intervention.batch_idx >= 0 else ""
    return f"step {intervention.global_step} (epoch {intervention.epoch}{batch})"


def _reason_and_advice(suggestion: str) -> tuple[str, str]:
    """The first sentence of a suggestion, which says why, and the others, which say what to do."""
    reason, *advice = re.split(r"(?<=[^.])\.\s+(?=[A-Z])", " ".join(suggestion.split()), maxsplit=1)
    return reason.rstrip(". "), advice[0] if advice else ""


_AFTER_A_FAULT = frozenset({"skip", "restore", "stop"})
"""Remedies for a fault whose cause is looked for."""

_CORRECTIONS = frozenset({"scale", "clip", "reset moments"})
"""Remedies that change how updates are made."""

_PHRASES = {
    "skip": ("skipped the batch", "skipped the batch"),
    "restore": ("went back to {to}", "gone back to {to}"),
    "restore averages": ("restored averages alone", "restored averages alone"),
    "restore scale": ("restored the loss scale alone", "restored the loss scale alone"),
    "scale": ("learning rate {lr}", "changed the learning rate {lr}"),
    "clip": ("turned gradient clipping on", "turned gradient clipping on"),
    "reset moments": ("emptied the optimizer's state", "emptied the optimizer's state"),
    "undo": ("undid what the batch had changed", "undone what the batch had changed"),
    "resume": ("resumed from another checkpoint", "resumed from another checkpoint"),
    "rewrite": ("wrote the last good state in its place", "written the last good state in its place"),
    "hold rate": ("used the last valid learning rate", "used the last valid learning rate"),
    "hold value": ("used the last valid value", "used the last valid value"),
    "give back": ("raised the learning rate again{rise}", "raised the learning rate again{rise}"),
    "take back": ("took the intervention back", "taken the intervention back"),
    "end clipping": ("turned gradient clipping off", "turned gradient clipping off"),
    "redo": ("made the step again", "made the step again"),
    "leave out": ("left the micro-batch out of its update", "left the micro-batch out of its update"),
    "keep good samples": ("made the update from the good samples", "made the update from the good samples"),
    "stop": ("stopped the run", "stopped the run"),
}

_RESTARTED = ("went on from a restart at {to}", "gone on from a restart at {to}")


def _done(intervention: Intervention) -> str:
    applied, before, after = intervention.applied, intervention.lr_before, intervention.lr_after
    to = "an earlier state" if intervention.snapshot_step is None else f"step {intervention.snapshot_step}"
    if restarted := intervention.restart_updates:
        to += f", which a trial had trained for {counted(restarted, 'update')}"
    if lost := intervention.updates_lost:
        to += f" ({counted(lost, 'update')} undone)"
    known = before is not None and after is not None and f"{before:.4g}" != f"{after:.4g}"
    rate = f"{before:.4g} → {after:.4g}" if known else "changed" if applied else ""
    words = list(intervention.remedies)
    if known and not {"scale", "give back"} & set(words):
        # The user's own remedy may change the rate under another word.
        words.append("scale")
    if {"restore", "redo"} <= set(words):  # updates since a snapshot, and not only the step
        words[words.index("redo")] = "made the updates since then again"
    phrases = {**_PHRASES, "restore": _RESTARTED} if restarted else _PHRASES
    rise = f": {rate}" if known else ""
    told = {word: both[not applied].format(to=to, lr=rate, rise=rise).strip() for word, both in phrases.items()}
    parts = [told.get(word, word) for word in words]
    by_itself = intervention.finding is not None and intervention.finding.scope == "state"
    if by_itself and _CORRECTIONS & set(words) and "restore" in words:
        parts.append("in case the updates are the cause")
    text = ", ".join(parts) or ("did nothing" if applied else "done nothing")
    return text if applied else f"would have {text}"


def describe_finding(finding: Finding, *, confidence: bool = False) -> str:
    """Say in one line what causes a fault, where, and what to do about it.

    Args:
        finding: The cause.
        confidence: Whether to add how sure it is.

    Example:
        >>> describe_finding(Finding("dead_relu", 0.9, place="net.1 (ReLU)", suggestion="Lower the learning rate."))
        'dead_relu in net.1 (ReLU): Lower the learning rate.'
    """
    place = f" in {finding.place}" if finding.place else ""
    samples = f" ({words})" if (words := samples_in_words(finding)) else ""
    suggestion = f": {finding.suggestion}" if finding.suggestion else ""
    text = printable(f"{finding.cause}{place}{samples}{suggestion}")
    return f"{text} (confidence {finding.confidence:.2g})" if confidence else text


def describe_advice(advice: Advice) -> str:
    """Say in one line what was noticed, and when.

    Example:
        >>> describe_advice(Advice(0, 0, "preflight", Finding("dead_relu", 0.9, place="net.1 (ReLU)")))
        'step 0 (epoch 0), advice (preflight): dead relu in net.1 (ReLU)'
    """
    finding = advice.finding
    occasion = "" if advice.occasion == SUSPICION else f" ({advice.occasion})"
    words = "" if "sample" in finding.suggestion else samples_in_words(finding)
    samples = f" ({words})" if words else ""
    suggestion = f": {finding.suggestion}" if finding.suggestion else ""
    what = f"{in_words(finding.cause)}{_where(finding)}{samples}{suggestion}"
    return printable(f"step {advice.global_step} (epoch {advice.epoch}), advice{occasion}: {what}")


def _where(finding: Finding) -> str:
    """The place of a finding; empty if it is only the loss or the gradient."""
    return f" in {finding.place}" if finding.place and finding.place not in ("loss", "gradient") else ""


def origin_in_words(finding: Finding) -> str:
    """The rows of a finding's samples, how often they were found, and on which rank; empty if not known.

    Example:
        >>> origin_in_words(Finding("bad_label", 1.0, {"times_met": 3.0, "rank": 1.0}, samples=(4,), rows=(100,)))
        'row 100 of the data set, seen 3 times, on rank 1'
    """
    known = finding.evidence
    if finding.rows:
        words = [f"{listed_numbers('row', finding.rows)} of the data set"]
    elif "hash" in known and "position" in known:
        words = [f"batch {_number(known['position'])} of the epoch"]
        words += [f"hash {known['hash']}"] if known["hash"] else []
    else:
        words = []
    if "times_met" in known:
        often = "up to " if len(finding.rows or finding.samples) > 1 else ""
        words.append(f"seen {often}{_number(known['times_met'])} times")
    if "rank" in known:
        words.append(f"on rank {_number(known['rank'])}")
    return ", ".join(words)


def samples_in_words(finding: Finding) -> str:
    """The samples of a finding: their rows if these are known, else their places in the batch."""
    places = listed_numbers("sample", finding.samples) if finding.samples else ""
    if finding.rows:
        return origin_in_words(finding)
    return ", ".join(part for part in (places, origin_in_words(finding)) if part)


def _number(value: float | str) -> str:
    return f"{value:,.0f}" if isinstance(value, float) and value - value == 0.0 else str(value)


@final
class Thinning:
    """Chooses which interventions are shown, and how. It depends on counts only, never on time.

    Interventions with the same fault, cause and remedies are one kind. An intervention that stops the run is always
    shown in full. With ``observe=True`` no stop ends the run, so only the first one is shown.

    Args:
        show_first: How many of a kind are all shown. After these, the count doubles from one to the next.
        everything: Whether all are shown, the first of a kind in full.

    Example:
        >>> thinning, skip = Thinning(), Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)
        >>> [len(thinning.shown(skip).splitlines()) for _ in range(8)]
        [2, 1, 0, 1, 0, 0, 0, 1]
    """

    def __init__(self, show_first: int = 1, *, everything: bool = False) -> None:
        self._show_first = show_first
        self._everything = everything
        self._seen: Counter[Kind] = Counter()
        self.would_have_stopped = False
        """Whether a stop of an observed run was shown."""

    def shown(self, intervention: Intervention) -> str:
        """The text of the next intervention; empty if it is not shown."""
        if "stop" in intervention.remedies and not intervention.applied:
            if self.would_have_stopped and not self._everything:
                return ""
            self.would_have_stopped = True
        self._seen[intervention.kind] += 1
        seen = self._seen[intervention.kind]
        doublings, rest = divmod(seen, self._show_first)
        if seen == 1 or intervention.ends_run:
            return tell(intervention)
        if self._everything:
            return tell_again(intervention)
        if seen <= self._show_first or (rest == 0 and doublings & (doublings - 1) == 0):
            return f"{tell_again(intervention)} ({seen:,} so far)"
        return ""
