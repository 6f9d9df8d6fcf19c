from collections.abc import Callable
from typing import Any

import pytest

from lightning_surge.measure.records import Measurement
from lightning_surge.policy.history import NoiseHistory
from lightning_surge.policy.policy import Decision, Policy


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Decision]]:
    """Every batch size that the policy is asked about at a step, with its answer."""
    taken: list[tuple[float, Decision]] = []
    decide = Policy.decide

    def noted(self: Policy, batch_size: float) -> Decision:
        decision = decide(self, batch_size)
        taken.append((batch_size, decision))
        return decision

    monkeypatch.setattr(Policy, "decide", noted)
    return taken


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Measurement], Any]], list[Any]]:
    """What a function says of every measurement from now on."""
    add = NoiseHistory.add

    def watch(look: Callable[[Measurement], Any]) -> list[Any]:
        rows: list[Any] = []

        def added(self: NoiseHistory, measurement: Measurement) -> None:
            rows.append(look(measurement))
            add(self, measurement)

        monkeypatch.setattr(NoiseHistory, "add", added)
        return rows

    return watch
