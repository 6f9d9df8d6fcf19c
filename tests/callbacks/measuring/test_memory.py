"""How many parameter-sized buffers measuring holds, from the allocator's own record."""

import pytest

from benchmarks.overhead import __main__ as overhead


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")
def test_one_buffer_between_probes_and_four_during_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Four million parameters, against which batches are nothing; `make bench` has 25, too.
    monkeypatch.setattr(overhead, "MEMORY", overhead.MEMORY[:1])
    assert [bound for _, bound in overhead.PHASES.values()] == [1.0, 4.0]
    records = overhead.measure_memory()
    assert {(record["phase"], record["accumulation"]) for record in records} == {
        (phase, accumulation) for phase in overhead.PHASES for accumulation in (1, 4)
    }
    for record in records:
        assert record["parameters"] >= 4_000_000
        if record["phase"] == "between probes":
            assert record["measurements"] == 0, record
        else:
            assert record["measurements"] >= 4, record
            # Less would mean that the record missed the probe, or what windows keep: their largest tensor.
            assert record["buffers"] > (0.5 if record["accumulation"] == 1 else 0.2), record
        assert record["buffers"] <= overhead.PHASES[record["phase"]][1], record
