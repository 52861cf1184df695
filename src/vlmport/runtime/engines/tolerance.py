"""The largest error of an engine that is rounding, in standard deviations of a result."""

from __future__ import annotations

from vlmport.bundle.precisions import ANY
from vlmport.runtime.graphs.devices import Device
from vlmport.runtime.probe import QUANTIZED_TOLERANCE, TOLERANCE

# Arithmetic of products → the largest error. bf16 has 8 bits: 0.01 to 0.1 in the built-in models.
# The known faults of engines are 4 and more, or NaN.
COARSE = {"bf16": 0.25, "f16": 0.05}


def tolerance_of(form: str, device: Device) -> float:
    """Return the largest error of a component in this precision on this device."""
    return max(_own(form), COARSE.get(device.arithmetic, 0.0))


def coarseness(form: str, device: Device) -> float:
    """Return how many times the tolerance of a precision the device's own is: 1 or more."""
    return tolerance_of(form, device) / _own(form)


def _own(form: str) -> float:
    # A component's only form is in float32.
    return TOLERANCE["fp32"] if form == ANY else TOLERANCE.get(form, QUANTIZED_TOLERANCE)
