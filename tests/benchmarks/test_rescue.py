"""The rescue suite measures what it says it measures."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace

import pytest
import torch

from benchmarks.rescue import __main__ as command
from benchmarks.rescue.ablation import ABLATIONS, EVERYONE
from benchmarks.rescue.cases import FAILING, HEALTHY, Case, form
from benchmarks.rescue.contenders import CONTENDERS, Attempt
from benchmarks.rescue.data import loader
from benchmarks.rescue.faults import BadLoss, BadWeight
from benchmarks.rescue.measuring import FORMS, Job, jobs, judge, measure
from benchmarks.rescue.models import TASKS
from benchmarks.rescue.ranks import on_ranks
from benchmarks.rescue.realistic.catalogue import REALISTIC, TWINS
from benchmarks.rescue.running import train

WARNINGS = pytest.mark.filterwarnings("ignore")
pytestmark = WARNINGS


def short(name: str, steps: int = 40) -> Case:
    """A case of a form, cut short."""
    return replace(FORMS[name].draw(3), steps=steps)


def test_enough_forms():
    """There are at least 80 failing and 60 healthy forms, no two of one name."""
    assert len(FAILING) >= 80
    assert len(HEALTHY) >= 60
    assert len(FORMS) == sum(map(len, (FAILING, HEALTHY, REALISTIC, TWINS)))


def test_every_family_and_optimizer_fails_somewhere():
    """The failing forms cover the families, optimizers and precisions the suite promises."""
    assert {"linear", "mlp", "cnn", "gru", "rnn", "transformer", "embedding", "autoencoder", "gan"} <= {
        f.task for f in FAILING
    }
    assert {f.optimizer for f in FAILING} == {"sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad", "lbfgs"}
    assert {"bf16", "fp16"} <= {f.options.get("precision") for f in FAILING}


@pytest.mark.parametrize("chosen", [*FAILING, *HEALTHY], ids=lambda f: f.name)
def test_a_draw_depends_on_its_seed_alone(chosen):
    """The same seed gives an equal case, another seed another one; only a failing case has a fault."""
    assert repr(chosen.draw(4)) == repr(chosen.draw(4))
    assert chosen.draw(4).seed != chosen.draw(5).seed
    assert (chosen.draw(4).fault is None) == (chosen.fault is None)
    assert chosen.draw(4).twin.fault is None
    assert chosen.task in TASKS


def test_seed_sets_never_meet():
    """No seed is used both to tune and to report."""
    draws = [jobs(FAILING, HEALTHY, 300, command.FIRST_SEED[s] + 1000 * k, ["bare"]) for s, k in
             (("tune", 0), ("tune", 499), ("report", 0))]  # fmt: skip
    seeds = [{seed for job in batch for seed in job.seeds} for batch in draws]
    assert not seeds[0] & seeds[1]
    assert max(seeds[0] | seeds[1]) < min(seeds[2])


@pytest.mark.parametrize(
    "name", ["plain:mlp/adam", "precision:mlp/momentum/fp16", "dropout:dropout/adam", "plain:gan/adam"]
)
def test_a_run_repeats_bit_by_bit(name):
    """Two trainings of a healthy case end in the same state, and another seed in another."""
    case = short(name)
    first = train(case)
    assert first.error is None
    assert first.digest == train(case).digest
    assert first.digest != train(replace(case, seed=case.seed + 1)).digest


def test_a_rewritten_random_state_is_seen():
    """Bit-identity covers the random streams: a callback that draws one number is caught."""
    import pytorch_lightning as pl

    class Draws(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            torch.rand(())

    case = short("plain:linear/sgd")
    assert train(case).digest != train(case, [Draws()]).digest


def test_bare_nan_is_not_rescued():
    """One NaN loss leaves bare Lightning with NaN weights, and the judge says so; the skip rule saves that run."""
    case = replace(form("x", "mlp/adam/steps120").draw(1), fault=BadLoss(float("nan"), 30))
    twin = train(case.twin)
    bare = judge(case, CONTENDERS["bare"].attempt(case), "bare", twin)
    skip = judge(case, CONTENDERS["skip"].attempt(case), "skip", twin)
    assert not bare.rescued
    assert bare.poisoned
    assert skip.rescued
    assert skip.interventions == 1


def test_twin_is_judged_rescued():
    """The twin regains all of its own improvement."""
    case = replace(form("x", "linear/sgd").draw(1), fault=BadWeight(float("nan"), 30))
    twin = train(case.twin)
    verdict = judge(case, Attempt(twin), "bare", twin)
    assert verdict.rescued
    assert verdict.regained == pytest.approx(1.0)


def test_a_run_in_two_processes():
    """With two processes each rank trains on half of a batch; the judge sees the first rank's end and interventions."""
    result = measure(Job("loss_nan:linear/sgd", (1,), ("bare", "certain"), processes=2))
    assert result.fails
    assert result.learns
    assert result.verdicts["certain"].rescued
    assert result.verdicts["certain"].interventions == 1
    alone = FORMS["loss_nan:linear/sgd"].draw(1)
    assert train(alone.twin).final != pytest.approx(result.twin, rel=1e-9)


def test_ranks_share_rows_in_their_order():
    """Two ranks' batches make up the batch of one process; rows that have an order keep it."""
    rows = (torch.arange(40),)
    alone = [batch[0].tolist() for batch in loader(rows, 8, shuffle=False, seed=1)]
    shares = [loader(rows, 8, shuffle=False, seed=1, rank=rank, ranks=2) for rank in range(2)]
    assert [sorted([*a[0].tolist(), *b[0].tolist()]) for a, b in zip(*shares, strict=True)] == alone
    mixed = [[row for batch in loader(rows, 8, shuffle=True, seed=1, rank=rank, ranks=2) for row in batch[0].tolist()]
             for rank in range(2)]  # fmt: skip
    assert sorted(mixed[0] + mixed[1]) == list(range(40))
    assert mixed[0] != list(range(0, 40, 2))


def test_ranks_that_end_are_said():
    """A rank that dies leaves an error, not a benchmark that waits."""
    case = replace(FORMS["plain:linear/sgd"].draw(1), processes=2)
    with pytest.raises(RuntimeError, match="a rank of plain:linear/sgd#1 ended without a result"):
        on_ranks(case, lambda: os._exit(1))


def test_a_mask_is_no_poison():
    """The −inf of a causal mask was there before fit, also in an averaged copy."""
    run = train(short("average_nan:transformer/adamw/ema", 4).twin)
    assert run.poisoned == ()


def test_a_hopeless_run_wants_a_clear_error():
    """A run that nothing can save counts for nobody who lets it pass in silence."""
    result = measure(Job("all_nan:regression/sgd", (1,), ("bare", "skip")))
    assert result.fails
    assert not any(v.rescued for v in result.verdicts.values())


def test_a_form_that_does_not_fail_is_set_aside():
    """A draw that survives without help is no failing run."""
    FORMS["tame"] = replace(form("tame", "linear/sgd/steps60"), fault=lambda room: BadLoss(1.0, 3))
    try:
        result = measure(Job("tame", (1, 2), ("bare",)))
    finally:
        del FORMS["tame"]
    assert not result.fails
    assert len(result.survivors) == 2


def test_an_unknown_word_is_refused():
    """A misspelt form fails when it is written, not when it runs."""
    with pytest.raises(ValueError, match="'cosin' is no schedule"):
        form("x", "mlp/adam/cosin")


def test_the_command_writes_its_results(tmp_path, capsys):
    """A small run through the command line prints the table and writes JSON without NaN, and the plot."""
    output = tmp_path / "rescue.json"
    arguments = ["--cases", "^(loss_nan|plain):linear/sgd$", "--draws", "1", "--jobs", "1", "--contenders", "bare,skip"]
    assert command.main([*arguments, "--output", str(output), "--jsonl", str(tmp_path / "all.jsonl")]) == 0
    written = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert written["contenders"]["bare"]["share"] == 0
    assert written["contenders"]["skip"]["share"] == 1
    assert written["contenders"]["skip"]["healthy_identical"] == 1
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "Failing runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("rate10000:mlp/sgd#511010", "gradient_spike"),
        ("rate10000:regression/momentum#130010", "rate_still_high"),
        ("weight_matrix:rnn/adam#511000", "implausible_state"),
        ("target_1e15:linear/sgd#512000", "implausible_state"),
    ],
)
@pytest.mark.parametrize("contender", ["evidence", "deferred"])
def test_what_was_lost_once_is_saved(name, fault, contender):
    """Units that died in a rehearsal, a rate that few batches chose, a matrix that saturated, a start corrupt twice."""
    form, _, seed = name.partition("#")
    case = FORMS[form].draw(int(seed))
    attempt = EVERYONE[contender].attempt(case)
    assert judge(case, attempt, contender, train(case.twin)).regained > 0.9
    assert fault in {act["fault"] for act in attempt.interventions}
    assert attempt.run.calls > case.steps  # batches that the guard ran again count, although it puts the module back


@pytest.mark.slow
def test_the_guard_saves_what_it_saved(tmp_path):
    """On a few of the forms the guard saves nearly all runs and touches no healthy one; `make rescue` has all."""
    output = tmp_path / "rescue.json"
    arguments = ["--fast", "--seeds", "tune", "--jobs", "1", "--output", str(output)]
    assert command.main([*arguments, "--contenders", "certain,evidence"]) == 0
    # When snapshots fall due depends on the time, so that single draws differ from run to run.
    for setting, least in (("certain", 0.65), ("evidence", 0.85)):
        guard = json.loads(output.read_text())["contenders"][setting]
        assert guard["failing"] >= 12
        assert guard["share"] >= least
        assert guard["healthy"] >= 5
        assert guard["healthy_identical"] == guard["healthy"]
        assert guard["healthy_touched"] == 0


@pytest.mark.parametrize("place", sorted({place for one in ABLATIONS.values() for place in one._replaced}))
def test_an_ablation_takes_something_away(place):
    """What an ablation puts something else in the place of is there under that name."""
    names = f"lightning_nanguard.{place}".split(".")
    found = importlib.import_module(".".join(names[:2]))
    for number, name in enumerate(names[2:], 3):
        if not hasattr(found, name):
            importlib.import_module(".".join(names[:number]))
        found = getattr(found, name)


def test_an_ablation_says_what_a_rule_earns(tmp_path, capsys, monkeypatch):
    """Without a look at plausibility an input that batch norm swallows ruins the run."""
    monkeypatch.setattr(command, "ABLATIONS", {"no plausibility": ABLATIONS["no plausibility"]})
    arguments = ["--cases", "^input_1e15:cnn/adam$", "--draws", "1", "--jobs", "1", "--only", "failing", "--ablation"]
    assert command.main([*arguments, "--output", str(tmp_path / "ablation.json")]) == 0
    written = json.loads((tmp_path / "ablation.json").read_text())["contenders"]
    assert written["evidence"]["rescued"] == 1
    assert written["no plausibility"]["rescued"] == 0
    assert "What each rule earns" in capsys.readouterr().out
