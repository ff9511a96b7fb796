"""The release of a run: model and dataset with cards, datasheet, licences, release list and checksums.

Enters: a finished run. Leaves: a folder that can be given away, or a `LicenceError` that says what stands against it.
"""

from medmm_ray.release.building import Evaluation, FinishedRun, Release, make, push
from medmm_ray.release.config import ReleaseConfig
from medmm_ray.release.licences import LicenceError

__all__ = ["Evaluation", "FinishedRun", "LicenceError", "Release", "ReleaseConfig", "make", "push"]
