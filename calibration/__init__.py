"""Calibration: seeded phone screens with questions, and the reference checkpoint that answers them.

for sample in calibration.samples("calibration", 64):
    sample.image, sample.prompt, sample.answer
"""

from calibration.tasks import KINDS, Sample, is_correct, samples

__all__ = ["KINDS", "Sample", "is_correct", "samples"]
