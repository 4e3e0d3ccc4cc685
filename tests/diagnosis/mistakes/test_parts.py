"""Parts that are not trained or in evaluation mode. Each mistake is named, and what is meant is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.diagnosis.mistakes.parts import (
    detached_part,
    dropout_off,
    eval_mode,
    frozen_part,
    parameter_not_in_optimizer,
    parameter_without_gradient,
)
from tests.diagnosis.mistakes.seen import BIAS, BODY, HEAD, WELL, body, said


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (body(optimized=False, untrained=True), "body"),
        (body(optimized=False, untrained=False), None),
        (body(optimized=False, untrained=None), None),
        (body(optimized=False, untrained=True, moved=True), None),
        (body(optimized=False, untrained=True, gradient=False), None),
        (replace(body(optimized=False, untrained=True), unfreezes=True), None),
        (replace(WELL, parameters=(replace(BODY, optimized=False, untrained=True), BIAS, HEAD)), "body.0.weight"),
    ],
)
def test_parameter_not_in_optimizer(seen: Observation, place: str | None) -> None:
    """A part that gets gradients and is in no optimizer; not one without gradients, or trained before."""
    assert said(parameter_not_in_optimizer, seen) == place


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (body(gradient=False, cut=True), "body"),
        (body(gradient=False), None),
        (body(cut=True), None),
        (body(gradient=False, cut=True, copy=True), None),
        (body(gradient=False, cut=True, untrained=False), None),
        (body(gradient=False, cut=True, optimized=False), None),
    ],
)
def test_detached_part(seen: Observation, place: str | None) -> None:
    """A part of the optimizer whose result is used without its graph; not one whose result is not used."""
    assert said(detached_part, seen) == place


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (body(gradient=False, graph=False, untrained=True, moved=False), "body"),
        (body(gradient=False, graph=False, untrained=False, moved=False), None),
        (body(gradient=False, graph=False, untrained=True, moved=True), None),
        (body(gradient=False, graph=False, untrained=True, moved=None), None),
        (body(gradient=False, graph=False, untrained=True, moved=False, copy=True), None),
        (body(gradient=False, graph=False, untrained=True, moved=False, optimized=False), None),
        (body(gradient=False, graph=False, untrained=True, moved=False, ran=False), None),
        (body(gradient=False, graph=True, untrained=True, moved=False), None),
    ],
)
def test_parameter_without_gradient(seen: Observation, place: str | None) -> None:
    """A part of the optimizer run under no_grad; not an average, a target, or weights of an earlier training."""
    assert said(parameter_without_gradient, seen) == place


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (body(trainable=False, optimized=False, gradient=False, untrained=True), "body"),
        (body(trainable=False, optimized=False, gradient=False, untrained=False), None),
        (body(trainable=False, optimized=True, gradient=False, untrained=True), None),
        (body(trainable=False, optimized=False, gradient=False, untrained=True, ran=False), None),
        (body(trainable=False, optimized=False, gradient=False, untrained=True, copy=True), None),
        (body(trainable=False, optimized=False, gradient=False, untrained=True, moved=True), None),
        (replace(body(trainable=False, optimized=False, gradient=False, untrained=True), unfreezes=True), None),
        (
            replace(
                WELL,
                parameters=(
                    replace(BODY, trainable=False, optimized=False, gradient=False, untrained=True),
                    replace(BIAS, name="body.1.adapter"),
                    HEAD,
                ),
            ),
            None,
        ),
    ],
)
def test_frozen_part(seen: Observation, place: str | None) -> None:
    """A frozen part that looks untrained; not one trained before, to be unfrozen, not run, or beside adapters."""
    assert said(frozen_part, seen) == place


EVALUATED = tuple(replace(one, training=False, within="body") for one in WELL.modes)


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, modes=EVALUATED, evaluating=True), "the module"),
        (replace(WELL, modes=EVALUATED), "body"),
        (replace(WELL, modes=EVALUATED[:1]), None),
        (replace(body(untrained=True), modes=EVALUATED[:1]), "body"),
        (replace(body(gradient=False), modes=EVALUATED), None),
        (replace(WELL, modes=(replace(EVALUATED[1], within="body.2"),)), None),
    ],
)
def test_eval_mode(seen: Observation, place: str | None) -> None:
    """The whole module, or a trained part with dropout; not an untrained part, nor batch norm of a trained one."""
    assert said(eval_mode, seen) == place


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, modes=(WELL.modes[0], replace(WELL.modes[1], training=False))), "body.2"),
        (replace(WELL, modes=(WELL.modes[0], replace(WELL.modes[1], training=False, within="body"))), None),
        (replace(WELL, modes=(replace(WELL.modes[0], training=False), WELL.modes[1])), None),
        (replace(WELL, modes=(replace(WELL.modes[1], training=False),), evaluating=True), None),
    ],
)
def test_dropout_off(seen: Observation, place: str | None) -> None:
    """Dropout alone in evaluation mode; not with all that is around it, and not batch norm."""
    assert said(dropout_off, seen) == place
