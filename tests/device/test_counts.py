"""What one layer asks of a device, counted on the imitation: it is waited for a few times, whatever the calibration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.device.counts import count

pytestmark = pytest.mark.slow

# Once for each kind of layer its structure is found out, by looking at numbers.
_PROBING = ("topology.py", "probe.py", "outside.py")


@pytest.mark.parametrize("shape", ["llama-3-8b", "qwen3-32b"])
def test_a_layer_waits_for_the_device_a_few_times(shape: str, tmp_path: Path) -> None:
    few, more = (count(shape, tmp_path, samples, 512, small=True) for samples in (4, 8))
    waits = {place: times for place, times in few["by_wait"].items() if not place.startswith(_PROBING)}
    assert 0 < sum(waits.values()) <= 16, waits
    assert more["waits"] == few["waits"]  # none for a batch of tokens
    assert 0 < more["kernels"] - few["kernels"] < 250
    assert few["kernels"] < 8000
    # Every weight goes to the device once: in small shapes the tokens that come besides are about as much.
    assert few["uploaded_bytes"] < 2 * few["downloaded_bytes"]
