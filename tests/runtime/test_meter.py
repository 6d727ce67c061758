from pathlib import Path

import pytest

from tcal_compiler.runtime import meter
from tcal_compiler.runtime.meter import Meter

MB = 2**20


@pytest.fixture(params=["mark", "watch"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if request.param == "watch":
        monkeypatch.setattr(meter, "RESET", tmp_path / "none" / "clear_refs")
    elif not meter.RESET.exists():
        pytest.skip("this system has no high-water mark that can be set back")


def test_a_peak_that_is_gone_at_the_end_counts(how: None) -> None:
    with Meter() as m:
        before = m.peak
        block = bytearray(b"1") * (150 * MB)
        m._stop.wait(0.05)
        del block
    assert 140 * MB < m.peak - before < 300 * MB


def test_peaks_stay_with_the_meters_that_were_open(how: None) -> None:
    with Meter() as whole:
        base = whole.peak
        with Meter() as first:
            block = bytearray(b"1") * (150 * MB)
            first._stop.wait(0.05)
            del block
        with Meter() as second:
            pass
    assert first.peak - base > 140 * MB
    assert second.peak - base < 100 * MB
    assert whole.peak >= first.peak
