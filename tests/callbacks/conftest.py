import pytest

from lightning_surge.policy.policy import Decision, Policy


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Decision]]:
    """Every batch size that the policy is asked about at a step, with its answer."""
    taken: list[tuple[float, Decision]] = []
    decide = Policy.decide

    def noted(self: Policy, batch_size: float, lr: float) -> Decision:
        decision = decide(self, batch_size, lr)
        taken.append((batch_size, decision))
        return decision

    monkeypatch.setattr(Policy, "decide", noted)
    return taken
