import pytest

from benchmarks.soak.dry_runs import compare


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1008))
def test_a_dry_run_of_a_random_set_up_changes_nothing(seed: int) -> None:
    changed, measurements = compare(seed)
    assert changed == []
    assert measurements > 0
