"""The measure of harm draws the same runs each time, judges as it says, and goes on where it ended."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.rescue.arc import Arc
from benchmarks.rescue.cases import Case
from benchmarks.rescue.contenders import SETTINGS, Attempt
from benchmarks.rescue.harm import __main__ as command
from benchmarks.rescue.harm import store
from benchmarks.rescue.harm.judging import is_harmed, is_healthy, is_touched, upper_bound
from benchmarks.rescue.harm.measuring import EVERYONE, Job, compare, draw, measure
from benchmarks.rescue.harm.store import Outcome, Store
from benchmarks.rescue.healthy import BY_NAME, DRAWN
from benchmarks.rescue.healthy.forms import forms
from benchmarks.rescue.running import Trained, train

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("units", "order", "plateau", "largest_rate", "language", "small_gain", "noise", "chance", "realistic")
CHEAP = "small_gain:weak_signal/sgd"


def short(name: str, seed: int = 3, steps: int = 12) -> Case:
    """A case of a form, cut short."""
    case = BY_NAME[name].draw(seed)
    return replace(case, steps=steps)


def ended(final: float, digest: str = "bare", **changes) -> Trained:
    """A run that ended at a loss."""
    return Trained(10.0, final, (), digest, None, 1.0, 1.0, 20, calls=20, **changes)


# ------------------------------------------------------------------------------------------------------- the forms


def test_enough_forms_of_every_kind():
    """There are at least 60 forms, no two of one name, and several of each kind the report names."""
    assert len(DRAWN) >= 60
    assert len(BY_NAME) == len(DRAWN)
    assert {form.kind for form in DRAWN} == set(KINDS)
    assert all(sum(form.kind == kind for form in DRAWN) >= 6 for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_depends_on_its_seed_alone(kind):
    """The same seed draws the same rate, data and net, another seed others; nothing is broken in a draw."""
    for form in (form for form in DRAWN if form.kind == kind):
        one, same, other = form.draw(4), form.draw(4), form.draw(5)
        assert repr(one) == repr(same) != repr(other)
        assert one.fault is None
        assert one.optimizer == form.name.rpartition("/")[2]
        for a, b in zip(one.recipe.data().train, same.recipe.data().train, strict=True):
            assert torch.equal(a, b)
        torch.manual_seed(0)
        shapes = [p.shape for p in one.recipe.net().parameters()]
        torch.manual_seed(0)
        assert shapes == [p.shape for p in same.recipe.net().parameters()]
        assert 50 <= one.steps <= 650


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_run_repeats_bit_by_bit(kind):
    """Two trainings of a draw end in the same state, and a reseeded twin in another."""
    form = next(form for form in DRAWN if form.kind == kind)
    case = short(form.name)
    first = train(case)
    assert first.error is None
    assert first.digest == train(short(form.name)).digest
    assert first.digest != train(replace(case, seed=case.seed + 1)).digest


def test_held_out_losses_draw_no_number():
    """A loss with chance in it is judged by numbers that are always the same, and leaves the streams alone."""
    for form in (form for form in DRAWN if form.kind == "chance"):
        task = form.draw(0).recipe
        net = task.net().eval()
        before = torch.get_rng_state()
        losses = [float((task.held or task.loss)(net, task.data().held, 10**9)) for _ in range(2)]
        assert losses[0] == losses[1]
        assert torch.equal(before, torch.get_rng_state())


def test_ordered_data_are_not_shuffled():
    """A run on ordered data sees its rows in their order, in every epoch."""
    assert all(form.draw(1).recipe.shuffle is False for form in DRAWN if form.kind == "order")


def test_an_unknown_case_is_refused():
    """A misspelt form, or a case without a seed, is said and not measured."""
    for name in ("units:nothing/adam#1", "units:linear/mse/adam", "units:linear/mse/adam#x"):
        with pytest.raises(ValueError, match="is no case; expected form#seed"):
            draw(name)


# -------------------------------------------------------------------------------------------------------- judging


def test_touched_is_any_intervention_or_any_bit():
    """An intervention counts though it changed nothing, and a bit counts though nothing is on record."""
    assert not is_touched(0, "a", "a")
    assert is_touched(1, "a", "a")
    assert is_touched(0, "b", "a")


@pytest.mark.parametrize(
    ("final", "harmed"), [(1.0, False), (0.2, False), (1.19, False), (1.21, True), (float("nan"), True)]
)
def test_harmed_is_worse_than_chance_makes_it(final, harmed):
    """A run that fell from 10 to 1 and whose twins span 0.2 is harmed above 1.2, wherever the twins lie."""
    for shift in (0.0, 5.0):
        twins = [0.8 + shift, 0.9 + shift, 1.0 + shift, 0.85 + shift, 0.95 + shift]
        assert is_harmed(final, True, 10.0, 1.0, twins) == harmed


def test_harm_has_no_unit():
    """Losses in another unit, or with a constant on top, are judged the same."""
    twins = [0.8, 0.9, 1.0, 0.85, 0.95]
    for final in (1.1, 1.3):
        judged = {is_harmed(a * final + b, True, a * 10 + b, a * 1.0 + b, [a * t + b for t in twins])
                  for a, b in ((1, 0), (1e5, 0), (1, 700), (1e-3, -40))}  # fmt: skip
        assert len(judged) == 1


def test_a_run_that_ended_in_an_error_is_harmed():
    """A healthy run that an error ended is harmed whatever its loss; without twins rounding alone is forgiven."""
    assert is_harmed(0.5, False, 10.0, 1.0, [0.8, 1.2])
    assert not is_harmed(1.0005, True, 10.0, 1.0, [])
    assert is_harmed(1.01, True, 10.0, 1.0, [])


def test_what_counts_as_healthy():
    """A bare run is healthy if it ended, is finite, and fell by the share its form asks for."""
    assert is_healthy(ended(8.9), 0.1)
    assert not is_healthy(ended(9.1), 0.1)
    assert is_healthy(ended(11.0), -0.2)
    assert not is_healthy(ended(float("nan")), -0.2)
    assert not is_healthy(replace(ended(1.0), error=("ValueError", "x")), 0.1)
    assert not is_healthy(replace(ended(1.0), poisoned=("weight a",)), 0.1)


def test_the_bound_is_exact():
    """None of 1,000 excludes a share above 0.3 % with 95 % confidence; the bound falls with the draws."""
    assert upper_bound(0, 1000) == pytest.approx(1 - 0.05 ** (1 / 1000), rel=1e-6)
    assert upper_bound(1, 85) == pytest.approx(0.0545, abs=1e-3)
    assert upper_bound(3, 3) == 1.0
    assert upper_bound(0, 100) > upper_bound(0, 200)


def test_an_outcome_says_what_was_done():
    """Interventions, bits, batches run again, harm and a rate that is too high stand in the outcome; a bare end is no
    touch."""
    acts = [{"global_step": 9, "fault": "stuck_loss", "remedies": ["restore", "scale"]}] * 20
    bare = ended(1.0)
    hurt = compare("units:x#1", bare, "evidence", Attempt(ended(2.0, "other"), acts), [1.0, 1.1, 0.9, 1.0, 1.2])
    assert hurt.touched
    assert hurt.harmed
    assert hurt.interventions == 20
    assert hurt.acts[0] == [9, "stuck_loss", "restore+scale"]
    assert len(hurt.acts) < 20
    assert not hurt.improved
    helped = compare("units:x#1", bare, "evidence", Attempt(ended(0.5, "other"), acts), [1.0, 1.1, 0.9, 1.0, 1.2])
    assert helped.improved
    assert not helped.harmed
    assert replace(helped, lower=[0.95, 0.6]).better_at_lower_rate
    assert not replace(helped, lower=[0.95, 0.8, 2.0]).better_at_lower_rate
    plain = Outcome("units:x#1", "bare", healthy=True, initial=10.0, bare=1.0, lower=[0.5, 4.0])
    assert plain.regains
    assert not replace(plain, bare=1.6).regains
    assert replace(plain, bare=1.6, lower=[]).regains
    left = compare("units:x#1", bare, "certain", Attempt(ended(1.0)), [])
    assert not left.touched
    assert not left.harmed
    again = replace(ended(1.0), calls=52)
    assert compare("units:x#1", bare, "evidence", Attempt(again), []).repeated == 32


# ------------------------------------------------------------------------------------------------------ measuring


def test_both_settings_are_measured():
    """A draw is put to the guard in both settings; under certain no batch is run again and no bit differs."""
    outcomes = measure(Job(f"{CHEAP}#1", ("certain", "evidence")))
    assert [o.contender for o in outcomes] == ["bare", "certain", "evidence"]
    certain = outcomes[1]
    assert certain.healthy
    assert certain.identical
    assert not certain.touched
    assert certain.repeated == 0


def test_what_changes_a_run_is_seen():
    """Clipping touches a healthy run, and five twins say whether it harms."""
    (bare, clipped) = measure(Job(f"{CHEAP}#1", ("clip",)))
    assert bare.healthy
    assert clipped.touched
    assert not clipped.identical
    assert len(clipped.twins) == 5
    assert clipped.bare == bare.final


def test_a_draw_that_is_not_healthy_is_set_aside(monkeypatch):
    """A bare run that diverges is kept as such, and nobody is put to it."""
    name = "aside:weak_signal/sgd"
    wild = forms("aside", lambda dice, *_: replace(BY_NAME[CHEAP].draw_recipe(dice), rate=1e6), "weak_signal/sgd")
    monkeypatch.setitem(BY_NAME, name, wild[0])
    (only,) = measure(Job(f"{name}#1", ("certain", "clip")))
    assert only.contender == "bare"
    assert not only.healthy


def test_arc_needs_its_environment(monkeypatch):
    """Without an environment for arc-training the error says how to make one."""
    monkeypatch.delenv("ARC_PYTHON", raising=False)
    with pytest.raises(RuntimeError, match="run `make arc`"):
        Arc().attempt(short(CHEAP))


# -------------------------------------------------------------------------------------------------------- keeping


def test_outcomes_are_kept(tmp_path):
    """What is written is read again, to seven digits; a line that was cut off is measured anew."""
    path = tmp_path / "kept.jsonl"
    hurt = Outcome("units:a#1", "evidence", True, False, 2, [[9, "stuck_loss", "restore"]], 64, None, True, 10.0, 1.0,
                   2.0, [1.0, 1.1], True, 1.4)  # fmt: skip
    Store(path).add([Outcome("units:a#1", "bare", True), hurt])
    with path.open("a") as file:
        file.write('{"case": "units:a#2", "contender": "ba')
    kept = Store(path)
    assert kept.outcomes["units:a#1", "evidence"] == hurt
    assert kept.missing("units:a#1", ("certain", "evidence")) == ("certain",)
    assert kept.missing("units:a#2", ("certain",)) == ("certain",)
    kept.add([Outcome("units:a#2", "bare", False)])
    assert len(Store(path).outcomes) == 3
    assert Store(path).missing("units:a#2", ("certain",)) == ()


def test_versions_do_not_mix(tmp_path, monkeypatch):
    """Another version of the code has a file of its own; the rivals' does not hang on the package."""
    names = {store.store_for("tune", tmp_path, rivals=rivals).path.name for rivals in (False, True)}
    assert len(names) == 2
    monkeypatch.setattr(store, "code_of", lambda source: source + "# changed")
    assert not names & {store.store_for("tune", tmp_path, rivals=rivals).path.name for rivals in (False, True)}


def test_prose_is_no_version():
    """Comments, docstrings and layout do not change the version; a number does."""
    code = store.code_of('def f():\n    """Says."""\n    return 1  # one\n')
    assert code == store.code_of("def f():\n\n    return (1)\n")
    assert code != store.code_of("def f():\n    return 2\n")


def test_seed_sets_never_meet():
    """No draw is used both to tune and to report."""
    names = [form.name for form in DRAWN]
    draws = [set(command.cases(names, 1000, command.FIRST_SEED[s] + 1000 * k)) for s, k in
             (("tune", 0), ("tune", 499), ("report", 0))]  # fmt: skip
    assert all(len(chosen) == 1000 for chosen in draws)
    seeds = [{int(case.rpartition("#")[2]) for case in chosen} for chosen in draws]
    assert not seeds[0] & seeds[1]
    assert max(seeds[0] | seeds[1]) < min(seeds[2])


def test_few_draws_hold_of_every_kind():
    """The order of the draws is mixed: the first 60 hold of all kinds."""
    chosen = command.cases([form.name for form in DRAWN], 60, 0)
    assert {case.partition(":")[0] for case in chosen} == set(KINDS)


# -------------------------------------------------------------------------------------------------------- command


def test_the_command_goes_on_where_it_ended(tmp_path, capsys, monkeypatch):
    """A second run measures only what is missing, and shows all of it; the figures are valid JSON."""
    output = tmp_path / "harm.json"
    arguments = ["--seeds", "tune", "--forms", f"^{CHEAP}$", "--jobs", "1", "--results", str(tmp_path), "--act-on",
                 "certain", "--output", str(output)]  # fmt: skip
    assert command.main([*arguments, "--draws", "1"]) == 0
    measured = []
    monkeypatch.setattr(command, "measure", lambda job: measured.append(job) or measure(job))
    assert command.main([*arguments, "--draws", "2"]) == 0
    assert [job.case for job in measured] == [f"{CHEAP}#1"]
    assert command.main([*arguments, "--draws", "2"]) == 0
    assert len(measured) == 1
    written = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    certain = written["contenders"]["certain"]
    assert (certain["draws"], certain["touched"], certain["harmed"], certain["repeated"]) == (2, 0, 0, 0)
    assert certain["groups"]["small_gain"]["draws"] == 2
    assert "NaNGuard certain" in capsys.readouterr().out


def test_one_case_by_its_name(capsys):
    """One case can be measured by its name, and all that is known of it is printed; nothing is kept."""
    assert command.main(["--case", f"{CHEAP}#1", "--act-on", "certain"]) == 0
    assert '"contender": "certain"' in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is no case"):
        command.main(["--case", "units#1"])


def test_an_unknown_rival_is_refused():
    """A misspelt rival is said before anything runs."""
    with pytest.raises(SystemExit, match="no rival is named clop"):
        command.main(["--rivals", "clop"])


def test_everyone_can_be_shown():
    """Whoever can be measured has a title for the table."""
    assert set(SETTINGS) <= set(EVERYONE)
    assert all(contender.title for contender in EVERYONE.values())


@pytest.mark.slow
def test_healthy_runs_are_left_alone(tmp_path):
    """Of a few of the forms none is touched by what is certain, where no batch is run again, and none is harmed."""
    output = tmp_path / "harm.json"
    arguments = ["--fast", "--seeds", "tune", "--jobs", "1", "--results", str(tmp_path), "--output", str(output)]
    assert command.main(arguments) == 0
    settings = json.loads(output.read_text())["contenders"]
    certain, evidence = settings["certain"], settings["evidence"]
    assert certain["draws"] == evidence["draws"] >= 7
    assert (certain["touched"], certain["harmed"], certain["repeated"]) == (0, 0, 0)
    assert evidence["harmed"] == 0
