"""How often a rule is near the best, and what it loses where it loses most."""

from typing import Any

from benchmarks.fidelity.everywhere import everywhere_rows


def rows(workload: str, batch_size: int, regrets: dict[str, float | None]) -> list[dict[str, Any]]:
    """Two seeds, a thousandth above and below."""
    key = {"workload": workload, "beta_2": 0.95, "phase": "late", "batch_size": batch_size}
    return [
        key
        | {"seed": seed, "rule": rule, "regret": None if regret is None else regret + 0.001 * (2 * seed - 1)}
        for seed in range(2)
        for rule, regret in regrets.items()
    ]


def test_a_rule_is_near_the_best_of_its_change() -> None:
    found = everywhere_rows(
        [
            *rows("perceptron", 64, {"sqrt": 0.004, "linear": 0.0, "step": 0.006}),
            # Percent, of which half are near.
            *rows("autoencoder", 64, {"sqrt": 0.0, "linear": 0.4, "step": 0.6}),
            # A change that one rule has not been run at is nobody's.
            *rows("perceptron", 256, {"sqrt": 0.0, "linear": 0.0, "step": None}),
        ],
        "regret",
    )
    near = [(row["rule"], row["nats"], row["near"]) for row in found]
    assert near == [
        ("sqrt", True, True),
        ("linear", True, True),
        ("step", True, False),
        ("sqrt", False, True),
        ("linear", False, True),
        ("step", False, False),
    ]
    assert [round(row["regret"], 6) for row in found] == [0.004, 0.0, 0.006, 0.0, 0.4, 0.6]
