"""Interventions become alerts of W&B."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_nanguard import WandbAlert
from tests.record.data import SKIP


def test_without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra that brings wandb."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-nanguard\[wandb\]'"):
        WandbAlert()


def test_alerts_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a kind is sent, and each that stops the run; without a W&B run the error says so."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WandbAlert()
    with pytest.raises(RuntimeError, match="Give the Trainer a WandbLogger"):
        sink.write(replace(SKIP, fault="another"))
    run = wandb.init(dir=tmp_path, project="nanguard")
    sent: list[tuple[str, str]] = []
    alert = run.alert

    def noted(title: str, text: str, level: object) -> None:
        sent.append((title, str(level)))
        alert(title=title, text=text, level=level)

    monkeypatch.setattr(run, "alert", noted)
    for remedies in (("skip",), ("skip",), ("stop",), ("stop",)):
        sink.write(replace(SKIP, remedies=remedies))
    run.finish()
    assert [title for title, _ in sent] == ["NaNGuard: non-finite gradient"] * 3
    assert [level.rpartition(".")[2] for _, level in sent] == ["WARN", "ERROR", "ERROR"]
