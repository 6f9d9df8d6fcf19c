"""How many parameter-sized buffers measuring holds, from the allocator's own record."""

import pytest

from benchmarks.overhead.__main__ import BUFFERS, measure_memory

pytestmark = pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")


def test_one_buffer_between_probes_and_four_or_five_during_one_on_20_million_parameters() -> None:
    assert list(BUFFERS.values()) == [1.0, 4.0, 5.0]
    records = measure_memory()
    assert {(record["phase"], record["accumulation"]) for record in records} == {
        (phase, accumulation) for phase in BUFFERS for accumulation in (1, 8)
    }
    for record in records:
        assert record["parameters"] >= 20_000_000
        if record["phase"] == "between probes":
            assert record["measurements"] == 0
            assert record["buffers"] <= BUFFERS[record["phase"]], record
        else:
            assert record["measurements"] >= 2
            # Less than half a buffer would mean that the record missed the probe.
            assert 0.5 < record["buffers"] <= BUFFERS[record["phase"]], record
