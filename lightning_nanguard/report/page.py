"""Makes the page of a run: one HTML file without scripts and external files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import chain

from lightning_nanguard.record.html import escaped, lines_of, table
from lightning_nanguard.record.layer_norms import LayerNorms
from lightning_nanguard.record.messages import describe_advice
from lightning_nanguard.record.receipts import receipt_of
from lightning_nanguard.record.summary import TO_DO
from lightning_nanguard.record.text import STEPS, counted, in_words, listed_numbers
from lightning_nanguard.record.trials import trials_in_words
from lightning_nanguard.report.data import RunData, loss_around
from lightning_nanguard.report.figure import draw, to_svg
from lightning_nanguard.thresholds.report import REPORT
from lightning_nanguard.types import SUSPICION, Advice, Intervention, Kind

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c2430; --soft: #f3f5f8; --line: #d9dee6;
  --ink: #5b6572; --first: #1f6fbf; --second: #b06a00; --bad: #c42b3a; --back: #7d3fc0; --good: #1d7f4c }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --text: #e4e8ee; --soft: #1c222b; --line: #333c48;
  --ink: #9aa5b3; --first: #62a8f0; --second: #f0a848; --bad: #ff7a86; --back: #c39af0; --good: #5fcf95 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; line-height: 1.3; margin: .5rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.good { color: var(--good) } .bad { color: var(--bad) } .quiet { color: var(--ink); font-size: .9rem }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem; padding: 0;
  list-style: none }
.numbers li { padding: .5rem .75rem; border-radius: .5rem; background: var(--soft) }
.numbers b { display: block; font-size: 1.15rem }
.wide { overflow-x: auto } .wide svg { display: block; width: 100%; min-width: 30rem; height: auto }
svg text { fill: var(--ink) }
details { margin: .5rem 0; padding: .5rem .75rem; border: 1px solid var(--line); border-radius: .5rem }
summary { cursor: pointer }
dl { display: grid; grid-template-columns: 5rem 1fr; gap: .25rem .75rem; margin: .5rem 0 } dt { color: var(--ink) }
dd { margin: 0 }
table { border-collapse: collapse; font-size: .85rem; white-space: nowrap } th, td { padding: .2rem .5rem;
  text-align: left; border-bottom: 1px solid var(--line) }
"""
# If a name were not escaped, this policy would still keep it from running or loading anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(data: RunData) -> str:
    """Make the page of a run.

    Returns:
        HTML without external files.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    name = data.folder.name if data.log is None else data.log.run_id
    parts = [
        _headline(data),
        "<h2>Curves</h2>",
        f'<div class="wide">{to_svg(draw(data))}</div>' if data.curve or data.interventions else "",
        "" if data.curve else '<p class="quiet">No curves were recorded in this folder.</p>',
        f'<p class="quiet">{escaped(STEPS)}</p>',
        *_interventions(data),
        *_trials(data),
        *_advice(data),
    ]
    return document(name, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Make a whole page without external files from its title and the HTML of its parts."""
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>NaNGuard: {escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def verdict(data: RunData) -> tuple[str, bool | None]:
    """The outcome of the run in one sentence, and whether it is good; ``None`` if this is not known."""
    count = counted(len(data.interventions), "intervention")
    losses = [one.loss for one in data.kept if one.loss is not None]
    if data.stopped:
        step = data.interventions[-1].snapshot_step
        left = "there was no certified snapshot" if step is None else f"the module has the weights of step {step}"
        return f"Lost: the guard stopped the run after {count}; {left}.", False
    if data.interventions and not any(one.applied for one in data.interventions):
        return f"Only observed: {counted(len(data.interventions), 'fault')}, and nothing was changed.", True
    if data.log is not None and not data.end and not data.alive:
        return f"Killed: the run did not reach its end; {count} before that.", False
    if data.mostly_skipped:
        return f"Mostly skipped: {data.mostly_skipped}.", False
    if losses and not math.isfinite(losses[-1]):
        return f"In trouble: the newest loss is not finite; {count}.", False
    if data.unreadable:
        return f"Not known: {counted(data.unreadable, 'intervention')} of the run cannot be read.", None
    if not data.interventions and data.advice:
        causes = sorted({in_words(one.finding.cause) for one in data.advice})
        held = f"; {trials_in_words(data.trials)}" if data.trials else ""
        return f"Nothing done: there is advice about {', '.join(causes)}{held}.", None
    if not data.interventions:
        return "Healthy: no interventions.", True
    first, last = data.losses_at_ends()
    if not data.alive and first is not None and last is not None and last > first:
        return f"Ended: {count}, and the loss is higher at the end than at the start.", None
    suspected = sorted({in_words(one.finding.cause) for one in data.advice if _is_open(one, data)})
    if suspected and not data.alive:
        return f"Ended: {count}, and there is advice about {', '.join(suspected)}.", None
    return f"{'Kept alive so far' if data.alive else 'Saved'}: {count}.", True


def _is_open(advice: Advice, data: RunData) -> bool:
    """Whether advice is a suspicion that no later rollback answers."""
    rollbacks = [one for one in data.interventions if "restore" in one.remedies and "redo" not in one.remedies]
    return advice.occasion == SUSPICION and not any(advice.global_step < one.global_step for one in rollbacks)


def heading(sentence: str, good: bool | None) -> str:
    """The heading of a page, in the colour of the outcome."""
    colour = {None: "unsure", True: "good", False: "bad"}[good]
    return f'<h1 class="{colour}">{escaped(sentence)}</h1>'


def _headline(data: RunData) -> str:
    remedies, rate = data.remedies, data.rate_now
    counts = [
        counted(len(data.interventions), "intervention"),
        counted(remedies["skip"], "batch skipped", "batches skipped"),
        counted(remedies["restore"], "rollback"),
        counted(data.updates_lost, "update undone by rollbacks", "updates undone by rollbacks"),
    ]
    if data.curve:
        counts.append(counted(max(one.step for one in data.curve), "step"))
    numbers = [(number, label) for number, _, label in (words.partition(" ") for words in counts)]
    first, last = data.losses_at_ends()
    if first is not None and last is not None:
        numbers.append((f"{first:.4g} → {last:.4g}", "loss, first to last"))
    numbers.append(("–" if rate is None else f"{rate:.4g}", f"learning rate {'at the end' if data.end else 'now'}"))
    multiplier = data.end.get("lr_multiplier")
    if isinstance(multiplier, (int, float)) and multiplier != 1:
        numbers.append((f"{multiplier:.4g}", "times the scheduled rate at the end"))
    items = "".join(f"<li><b>{escaped(value)}</b>{escaped(label)}</li>" for value, label in numbers)
    to_do = TO_DO.format(read=f"see step {data.first_skipped} below")
    advised = f"<p>What to do: {escaped(to_do)}.</p>" if data.mostly_skipped else ""
    return f'{heading(*verdict(data))}\n{_which(data)}\n<ul class="numbers">{items}</ul>{advised}{_resumed(data)}'


def _resumed(data: RunData) -> str:
    """A note for a resumed run: which fits the numbers count."""
    if not data.resumed_at:
        return ""
    steps = listed_numbers("step", data.resumed_at)
    words = f"All numbers on this page are of the whole run, which was resumed at {steps}."
    if data.of_last_fit is not None:
        updates, interventions = data.of_last_fit
        fit = f"{counted(updates, 'update')}, {counted(interventions, 'intervention')}"
        words += f" The last fit alone: {fit}."
    return f'<p class="quiet">{escaped(words)}</p>'


def _which(data: RunData) -> str:
    words = [f"folder {data.folder}"]
    if data.log is not None:
        words.insert(0, f"Run {data.log.run_id}")
        fits = [fit for log in (*data.earlier, data.log) for fit in log.fits]
        began = fits[0].get("time") if fits else None
        if isinstance(began, (int, float)) and 0 <= began < 1e11:
            words.append(f"begun {datetime.fromtimestamp(began, timezone.utc):%Y-%m-%d %H:%M} UTC")
        if len(fits) > 1:
            words.append(f"resumed {counted(len(fits) - 1, 'time')}")
        if data.earlier:
            words.append(f"before that in {', '.join(str(log.folder) for log in data.earlier)}")
    return f'<p class="quiet">{escaped("; ".join(words))}</p>'


def _interventions(data: RunData) -> list[str]:
    if not data.interventions:
        return []
    kinds: dict[Kind, list[int]] = {}
    for number, one in enumerate(data.interventions):
        kinds.setdefault(one.kind, []).append(number)
    # First the first intervention of each kind, then the others in order.
    wanted = chain((numbers[0] for numbers in kinds.values()), range(len(data.interventions)))
    shown = sorted(list(dict.fromkeys(wanted))[: REPORT.interventions_in_full])
    parts = ["<h2>Interventions</h2>"]
    if len(shown) < len(data.interventions):
        counts = Counter({in_words(fault): 0 for fault, _, _ in kinds})
        for (fault, _, _), numbers in kinds.items():
            counts[in_words(fault)] += len(numbers)
        told = f"{len(shown):,} of {len(data.interventions):,} are shown here; interventions.jsonl has all of them."
        parts.append(
            f'<p class="quiet">{told}</p><div class="wide">{table(("fault", "times"), counts.most_common())}</div>'
        )
    first = {numbers[0] for numbers in kinds.values()}
    return parts + [_intervention(data.interventions[number], data, number in first) for number in shown]


def _intervention(one: Intervention, data: RunData, is_open: bool) -> str:
    lines = lines_of(one)
    cost = _receipt(one, data)
    if cost:
        lines.append(("cost", cost))
    if one.finding is not None and one.finding.samples:
        lines.append(("in the batch", listed_numbers("sample", one.finding.samples)))
    if one.finding is not None and one.finding.evidence:
        evidence = ", ".join(f"{in_words(name)} {_number(value)}" for name, value in one.finding.evidence.items())
        lines.append(("evidence", f"{evidence} (confidence {_number(one.finding.confidence)})"))
    if one.ranks:
        lines.append(("ranks", ", ".join(map(str, one.ranks))))
    (_, seen), *rest = lines
    described = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in rest)
    return (
        f"<details{' open' if is_open else ''}><summary>{escaped(seen)}</summary><dl>{described}</dl>"
        f"{_layers(data.norms_at(one))}</details>"
    )


def _receipt(one: Intervention, data: RunData) -> str:
    """The lost updates and the result of an intervention."""
    words = []
    if "skip" in one.remedies:
        words.append("1 batch skipped")
    if one.updates_lost:
        words.append(f"{counted(one.updates_lost, 'update')} undone")
    words += loss_around(one, data)
    receipt = receipt_of(one, data.receipts)
    return "; ".join([*words, receipt.in_words()] if receipt is not None else words)


def _layers(found: LayerNorms | None) -> str:
    if found is None or not found.layers:
        return ""
    layers = list(found.layers.items())[: REPORT.layers]
    rows = [[name, *("–" if norm is None else f"{norm:.3g}" for norm in values)] for name, values in layers]
    more = len(found.layers) - len(layers)
    rest = f'<p class="quiet">and {counted(more, "layer")} more</p>' if more else ""
    head = ("update", *found.updates)
    title = "Gradient norms of the layers, those that changed most first"
    return f'<p class="quiet">{title}</p><div class="wide">{table(head, rows)}</div>{rest}'


def _trials(data: RunData) -> list[str]:
    if not data.trials:
        return []
    items = "".join(f"<li>{escaped(one.told())}</li>" for one in data.trials)
    what = "A trial trains restarts at lower learning rates beside the run. If none is far ahead, it changes nothing."
    return [f'<h2>Trials</h2><p class="quiet">{what}</p><ul>{items}</ul>']


def _advice(data: RunData) -> list[str]:
    if not data.advice:
        return []
    items = "".join(f"<li>{escaped(describe_advice(one))}</li>" for one in data.advice[: REPORT.advice])
    more = len(data.advice) - REPORT.advice
    rest = f'<p class="quiet">and {more:,} more in advice.jsonl</p>' if more > 0 else ""
    return [f"<h2>Advice</h2><ul>{items}</ul>{rest}"]


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else value
