"""Undoing what one batch changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import CatMetric, MaxMetric, MeanMetric, Metric

from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from tests.helpers import copied, same_bits
from tests.state.nets import Net


def test_a_batch_leaves_nothing_behind() -> None:
    """Batch-norm statistics, counters, and large buffers that turn out to change are put back bit by bit."""
    net = Net()
    net.register_buffer("large", torch.zeros(100_000))
    undo = BatchUndo(net)
    undo.open()
    net.large[0] = 1.0  # seen to change: copied from the next batch on
    undo.open()
    before = copied(dict(net.named_buffers()))
    net(torch.randn(6, 4))
    net.large[1] = math.nan
    assert same_bits(undo.before(), before)
    undo.undo()
    assert same_bits(dict(net.named_buffers()), before)


@pytest.mark.parametrize("thorough", [False, True])
def test_what_is_rarely_written_is_remembered_on_request(thorough: bool) -> None:
    """Frozen parameters and large buffers that never changed are copied only for a second look."""
    net = Net()
    net.register_buffer("large", torch.zeros(100_000))
    undo = BatchUndo(net, thorough=thorough)
    undo.open()
    assert {"frozen", "large"} <= undo.before().keys() or not thorough
    assert {"frozen", "large"}.isdisjoint(undo.before()) or thorough


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_the_device_decides(bad: float) -> None:
    """Buffers are put back where the flag is set, and left as they are where it is not; versions do not change."""
    net = Net()
    undo = BatchUndo(net)
    undo.open()
    before = copied(dict(net.named_buffers()))
    net(torch.randn(6, 4))
    after, version = copied(dict(net.named_buffers())), net.count._version
    undo.undo_where(torch.tensor(bad))
    assert same_bits(dict(net.named_buffers()), before if bad else after)
    assert net.count._version == version


def test_metrics_and_what_others_remember_go_back() -> None:
    """A torchmetrics object of the module forgets the batch, and so does what the caller remembers."""
    net = nn.Module()
    net.metric = MeanMetric()
    net.metric.update(3.0)
    seen: list[int] = []

    def other() -> Callable[[], None]:
        count = len(seen)
        return lambda: seen.__delitem__(slice(count, None))

    undo = BatchUndo(net, [other])
    undo.open()
    net.metric.update(9.0)
    seen.append(1)
    undo.undo(buffers=False)
    assert float(net.metric.compute()) == 3.0
    assert seen == []


class Clones(TorchDispatchMode):
    """Counts clones of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


class Walked(list[Any]):
    """Counts how often it is copied."""

    copies = 0

    def __iter__(self) -> Iterator[Any]:
        self.copies += 1
        return super().__iter__()


def test_only_metrics_that_have_changed_are_copied() -> None:
    """Those of validation are copied once, also where inference mode made their states; lists of states too."""
    net = nn.Module()
    net.train_metric, net.val_metric, net.val_list = MeanMetric(), MeanMetric(), CatMetric()
    with torch.inference_mode():
        net.val_metric.reset()
        net.val_metric.update(3.0)
        net.val_list.update(torch.arange(3.0))
    net.val_list.value = walked = Walked(net.val_list.value)
    undo = BatchUndo(net)
    undo.open()
    copies = walked.copies
    net.train_metric.update(1.0)
    with Clones() as clones:
        undo.open()
        undo.open()
    assert clones.count == len(net.train_metric._defaults)
    assert walked.copies == copies


def everything(metric: Metric) -> None:
    metric.update(torch.tensor([9.0]))


def in_inference_mode(metric: Metric) -> None:
    with torch.inference_mode():
        metric.update(torch.tensor([9.0]))


def in_place(metric: Metric) -> None:
    value = getattr(metric, next(iter(metric._defaults)))
    (value[-1:] if isinstance(value, list) else value.view(-1)[:1])[:] = [] if isinstance(value, list) else 7.0


@pytest.mark.parametrize("make", [MeanMetric, CatMetric, MaxMetric])
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
@pytest.mark.parametrize("change", [everything, in_inference_mode, Metric.reset, Metric.__call__, in_place])
def test_a_metric_goes_back_whatever_changed_it(
    make: Callable[[], Metric], made_in_inference_mode: bool, change: Callable[..., Any]
) -> None:
    """Also in the batch after one that was undone, and after one whose change is kept."""
    if made_in_inference_mode and change is in_place:
        pytest.skip("a state without a version is written by updates alone")
    net = nn.Module()
    net.metric = metric = make()
    with torch.inference_mode(made_in_inference_mode):
        metric.reset()
        metric.update(torch.tensor([3.0, 5.0]))
    changed = partial(change, metric, *([torch.tensor([4.0])] if change is Metric.__call__ else []))
    undo = BatchUndo(net)
    for _ in range(3):
        undo.open()
        before = copied(metric.metric_state), metric.update_count, copied(metric._computed)
        with torch.inference_mode(made_in_inference_mode):
            changed()
        undo.undo()
        assert same_bits((metric.metric_state, metric.update_count, metric._computed), before)
        undo.open()
        with torch.inference_mode(made_in_inference_mode):
            changed()


def test_a_buffer_of_another_shape_comes_back() -> None:
    """A memory bank that grows, a hidden state of a smaller batch, and a buffer that was ``None`` before the batch."""
    net = Net()
    net.register_buffer("bank", None)
    undo = BatchUndo(net)
    undo.open()
    mask = net.mask
    net.mask, net.bank = torch.zeros(7), torch.ones(2)
    undo.undo()
    assert net.mask is mask
    assert net.bank is None
    net.mask = torch.zeros(7)
    undo.open()
    net.mask[0] = 1.0
    undo.undo()
    assert net.mask.shape == (7,)
    assert not net.mask.any()


def test_modules_added_later_are_found() -> None:
    """The modules are listed anew after so many batches."""
    net = nn.Sequential(nn.BatchNorm1d(2))
    undo = BatchUndo(net, thresholds=replace(RepeatedStepsThresholds(), modules_counted_every=2))
    undo.open()
    net.append(nn.BatchNorm1d(2))
    undo.open()
    assert not any(name.startswith("1.") for name in undo.before())
    undo.open()
    assert any(name.startswith("1.") for name in undo.before())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_buffer_comes_back() -> None:
    """A nested buffer has no shape, and is the one from before the batch all the same."""
    net = Net()
    before = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    net.register_buffer("ragged", before)
    undo = BatchUndo(net)
    undo.open()
    undo.undo()
    assert net.ragged is before
    net.ragged = torch.nested.nested_tensor([torch.ones(4)])
    undo.undo()
    assert net.ragged is before


def test_hidden_modules_keep_their_own_copies() -> None:
    """If one of several networks in a list goes, the copies of the others are still theirs."""
    net = Net()
    net.hidden = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    undo = BatchUndo(net, thresholds=RepeatedStepsThresholds(modules_counted_every=1))
    for number, one in enumerate(net.hidden):
        one.running_mean.fill_(float(number))
    undo.open()
    last = net.hidden.pop()
    net.hidden[:] = [last]
    undo.open()
    last.running_mean.fill_(7.0)
    undo.undo()
    assert last.running_mean.tolist() == [1.0, 1.0]
