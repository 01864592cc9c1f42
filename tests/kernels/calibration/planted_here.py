"""Imported by a guarded child: plants the misbehaving implementations there."""

from tests.kernels.calibration.planted import plant

plant()
