"""How many parameter-sized buffers measuring holds, from the allocator's own record."""

import pytest

from benchmarks.overhead import __main__ as overhead


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")
def test_one_buffer_between_probes_and_four_or_five_during_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Four million parameters, against which batches are nothing; `make bench` has twenty.
    monkeypatch.setattr(overhead, "WIDTH", 900)
    assert list(overhead.BUFFERS.values()) == [1.0, 4.0, 5.0]
    records = overhead.measure_memory()
    assert {(record["phase"], record["accumulation"]) for record in records} == {
        (phase, accumulation) for phase in overhead.BUFFERS for accumulation in (1, 8)
    }
    for record in records:
        assert record["parameters"] >= 4_000_000
        between = record["phase"] == "between probes"
        assert record["measurements"] == 0 if between else record["measurements"] >= 2
        # Less than half a buffer would mean that the record missed the probe.
        assert between or record["buffers"] > 0.5, record
        assert record["buffers"] <= overhead.BUFFERS[record["phase"]], record
