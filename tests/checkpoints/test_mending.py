"""The last good state in the place of the one in a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lightning_nanguard.checkpoints.mending import mended
from lightning_nanguard.state.learner import Learner
from tests.helpers import copied, differences


class Mended:
    """A learner, its good state, and a checkpoint collected after all of it was lost."""

    def __init__(self, **content: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(2, 1)
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        self.net(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        learner = Learner(
            self.net, [self.optimizer], averages=lambda: {"EMA": {"module.weight": torch.full((1, 2), 7.0)}}
        )
        self.good = copied(dict(learner.leaves()))
        self.before = copied(self.collected())
        for tensor in (self.net.weight, self.optimizer.state[self.net.weight]["exp_avg"]):
            tensor.data.fill_(math.nan)
        self.content = {**self.collected(), **content}
        self.result = mended(self.content, learner, self.good)

    def collected(self) -> dict[str, Any]:
        return {
            "global_step": 5,
            "state_dict": dict(self.net.state_dict()),
            "optimizer_states": [self.optimizer.state_dict()],
            "lr_schedulers": [{"last_epoch": 3}],
        }


def test_weights_and_moments_are_the_good_ones() -> None:
    """The learner in it is the good one, its progress and schedulers stay, and the given checkpoint is not changed."""
    case = Mended()
    assert differences(case.result, case.before) == []
    assert bool(case.content["state_dict"]["weight"].isnan().all())


def test_averages_come_from_averages() -> None:
    """A callback's average is mended with the good average, and with the weights where it has none."""
    lost = torch.full((1, 2), math.nan)
    callbacks = {"EMA": {"average": {"weight": lost}}, "other": {"module.weight": lost, "bias": torch.ones(1)}}
    case = Mended(callbacks=callbacks, scores=(lost, [1.0]))
    assert case.result["callbacks"]["EMA"]["average"]["weight"].tolist() == [[7.0, 7.0]]
    assert torch.equal(case.result["callbacks"]["other"]["module.weight"], case.good[("parameter", "weight")])
    assert case.result["scores"][0] is lost


def test_an_average_that_is_saved_as_the_weights() -> None:
    """WeightAveraging saves the average as ``state_dict``, and the weights beside it."""
    lost = {"weight": torch.full((1, 2), math.nan)}
    case = Mended(state_dict=dict(lost), current_model_state=dict(lost))
    assert case.result["state_dict"]["weight"].tolist() == [[7.0, 7.0]]
    assert torch.equal(case.result["current_model_state"]["weight"], case.good[("parameter", "weight")])


def test_the_state_of_another_optimizer_stays() -> None:
    """What has groups of other sizes was not made by an optimizer of the learner."""
    other = {"state": {0: {"x": torch.ones(1)}}, "param_groups": [{"params": [0]}]}
    assert Mended(optimizer_states=[other]).result["optimizer_states"] == [other]


def test_optimizers_of_equal_sizes_are_told_apart() -> None:
    """The two optimizers of a GAN may have equally many parameters: each one gets its own moments back."""
    nets = [nn.Linear(2, 1), nn.Linear(3, 5)]
    optimizers = [torch.optim.AdamW(net.parameters()) for net in nets]
    for net in nets:
        net(torch.ones(1, net.in_features)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    learner = Learner(nn.ModuleList(nets), optimizers)
    good = copied(dict(learner.leaves()))
    before = copied([optimizer.state_dict() for optimizer in optimizers])
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["exp_avg"].fill_(math.nan)
    found = mended({"optimizer_states": [optimizer.state_dict() for optimizer in optimizers]}, learner, good)
    assert differences(found["optimizer_states"], before) == []
