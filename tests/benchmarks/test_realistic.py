"""The realistic forms are what the report says they are, and can be run, failed and repeated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.rescue import __main__ as command
from benchmarks.rescue.cases import Case
from benchmarks.rescue.faults import Peak, Rate
from benchmarks.rescue.measuring import FORMS
from benchmarks.rescue.optimizers import OWN, SAM, Lion, Muon, orthogonal
from benchmarks.rescue.realistic.calibrate import GRID, climb
from benchmarks.rescue.realistic.catalogue import FACTORS, REALISTIC, TASKS, TWINS
from benchmarks.rescue.realistic.rates import RATES
from benchmarks.rescue.running import train

pytestmark = pytest.mark.filterwarnings("ignore")


def short(name: str, steps: int = 4) -> Case:
    """A case of a form, cut short."""
    return replace(FORMS[name].draw(3), steps=steps)


def test_enough_forms():
    """There are at least 40 failing forms, of every model, optimizer and way of training that the report names."""
    assert len(REALISTIC) >= 40
    assert {form.task for form in REALISTIC} == set(TASKS)
    assert set(OWN) <= {form.optimizer for form in REALISTIC}
    options = {key for form in REALISTIC for key, value in form.options.items() if value}
    assert {"schedule", "clip_val", "accumulate", "precision", "average"} <= options


@pytest.mark.parametrize("name", sorted(TASKS))
def test_models_are_of_realistic_size(name):
    """A model has 0.1 to 1 million parameters, runs for 200 to 300 updates, and its held-out loss repeats exactly."""
    task = TASKS[name]
    torch.manual_seed(0)
    net = task.net().eval()
    assert 1e5 <= sum(p.numel() for p in net.parameters()) <= 1e6
    assert 200 <= task.steps <= 300
    state = torch.get_rng_state()
    losses = [float((task.held or task.loss)(net, task.data().held, 10**9)) for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("twin", TWINS, ids=lambda form: form.name)
def test_a_run_repeats_bit_by_bit(twin):
    """Two trainings end in the same state, finite and changed."""
    first = train(short(twin.name))
    assert first.error is None
    assert not first.poisoned
    assert first.changed
    assert first.digest == train(short(twin.name)).digest


def test_faults_are_multiples_of_the_right_rate():
    """The twin trains at the rate of the table; the fault multiplies it by the factor in the form's name."""
    for form in REALISTIC:
        where, _, spec = form.name.partition(":")
        factor = next(factor for factor in sorted(FACTORS, reverse=True) if where.endswith(str(factor)))
        case = form.draw(7)
        assert case.rate == RATES[spec]
        assert case.fault is not None
        assert 0.8 * factor < case.fault.factor < 1.25 * factor
        assert isinstance(case.fault, Rate if where.startswith("start") else Peak)
        assert case.group == case.heading == f"realistic, {where.removesuffix(str(factor))} x {factor}"
        assert case.twin.group == "healthy"


def test_own_optimizers_go_downhill():
    """Each optimizer of the suite's own brings a quadratic down, and makes as many evaluations as its kind does."""
    for name, make in OWN.items():
        torch.manual_seed(0)
        net, x = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3))), torch.randn(64, 6)
        optimizer, losses = make(net.parameters(), 0.01), []

        def closure(optimizer=optimizer, net=net, x=x, losses=losses):
            optimizer.zero_grad()
            losses.append((net(x) - x).square().mean())
            losses[-1].backward()
            return losses[-1]

        for _ in range(60):
            optimizer.step(closure)
        assert losses[-1] < 0.7 * losses[0], name
        assert len(losses) == (120 if name == "sam" else 60)


def test_the_rules_of_own_optimizers():
    """Lion moves by the rate, Muon by an orthogonal matrix, SAM by the gradient of the worst point nearby."""
    weight = torch.nn.Parameter(torch.ones(3))
    lion = Lion([weight], 0.1, weight_decay=0.0)
    weight.grad = torch.tensor([5.0, -0.01, 0.0])
    lion.step()
    assert torch.allclose(weight.detach(), torch.tensor([0.9, 1.1, 1.0]))
    singular = torch.linalg.svdvals(orthogonal(torch.randn(8, 5, generator=torch.Generator().manual_seed(0))))
    assert 0.6 < singular.min() <= singular.max() < 1.3
    matrices = [torch.nn.Parameter(torch.eye(4)) for _ in range(3)]
    muon = Muon(matrices, 0.1)
    assert [len(group["params"]) for group in muon.param_groups] == [1, 2]
    point = torch.nn.Parameter(torch.tensor([1.0]))
    sam = SAM([point], 0.1, radius=0.5)

    def closure():
        sam.zero_grad()
        loss = point.square().sum()
        loss.backward()
        return loss

    sam.step(closure)
    assert torch.allclose(point.detach(), torch.tensor([1.0 - 0.1 * 3.0]))


def test_the_right_rate_is_found_uphill():
    """The search climbs to the best rate from either side, and over one rate that is no better."""
    gains = {i: -abs(i - 9) - 1.5 * (i == 7) for i in range(len(GRID))}
    assert climb(gains.__getitem__, 5) == climb(gains.__getitem__, 13) == 9


def test_the_command_measures_a_group(tmp_path, capsys):
    """``--group realistic`` puts realistic forms under headings of their own, each once."""
    output = tmp_path / "realistic.json"
    arguments = ["--group", "realistic", "--cases", ":vae/adam/ema$", "--only", "failing", "--jobs", "1"]
    assert command.main([*arguments, "--list"]) == 0
    count = sum(form.name.endswith(":vae/adam/ema") for form in REALISTIC)
    assert f"{count} failing forms, 0 healthy ones" in capsys.readouterr().out
    arguments[3] = "^peak1000:vae/adam/ema$"
    assert command.main([*arguments, "--contenders", "bare,certain", "--output", str(output)]) == 0
    (case,) = json.loads(output.read_text())["cases"]
    assert case["group"] == "realistic, peak x 1000"
    assert not case["verdicts"]["bare"]["rescued"]
