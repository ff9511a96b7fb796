"""What counts as a duplicate or a leak, and how the splits are made."""

from typing import Literal

from pydantic import Field, model_validator

from medmm_ray.config import Config, Split, execution


class CurateConfig(Config):
    """How duplicates are found, and how questions are split."""

    near_duplicates: bool = True
    """Merge images that are the same picture in other bytes (recompressed, scaled); false: only equal bytes."""
    hash_distance: int = 4
    """Largest Hamming distance of two 64-bit perceptual hashes that proposes a pair as duplicates."""
    pixel_correlation: float = 0.98
    """Smallest correlation of the detail of two 32 x 32 thumbnails that confirms a proposed pair."""
    altered_pictures: bool = True
    """Merge images that are one picture, altered too: cropped, with a border, turned by some degrees, inverted."""
    aligned_correlation: float = Field(0.82, gt=0, le=1)
    """Smallest correlation of the fine structure of two aligned pictures that makes them one."""
    written: Literal["none", "checked", "reviewed"] = "none"
    """Questions that a model wrote: none, all that passed their checks, or those that readers keep (`reviews`)."""
    reviews: str = ""
    """What readers said of questions: an export, as python -m jobs.review_page what=questions --export names it."""
    official_test: Literal["keep", "as_others"] = "keep"
    """Test questions of benchmarks (python -m jobs.datasets): all stay as published, repeats and leaks leave
    training."""
    benchmark_guard: bool = True
    """Take test questions of benchmarks out of training, also of benchmarks that are not in the run."""
    guard: tuple[str, ...] = ()
    """Hashes of further test sets, files that python -m jobs.datasets --hash made."""
    text_similarity: float = Field(0.8, gt=0, le=1)
    """Share of common shingles from which two questions without a picture are one; 1: equal texts alone."""
    phi: Literal["off", "flag", "drop"] = "off"
    """Questions with names, dates to the day, phone and record numbers and other identifiers: not looked for, counted
    and named in the curation report, or left out of all but official tests."""
    phi_workers: int = execution(2, ge=1)
    """Workers that scan for identifiers at most."""
    diagnostic_only: bool = False
    """Leave out questions on pictures that only count, name the kind of picture, or need no picture; training's."""
    difficulty: Literal["as_published", "estimate"] = "as_published"
    """What questions without a difficulty get: nothing, or an estimate from their form (shares of 30, 50, 20 %)."""
    quotas: dict[Split, dict[str, int | dict[str, int]]] = Field(default_factory=dict)
    """Questions of each split, by modality and difficulty: {train: {radiology: {easy: 1200, hard: 800}, clinical:
    3000}}; what no quota takes leaves, official tests stay."""
    leakage: Literal["drop_train", "resplit"] = "drop_train"
    """Pictures in both splits: drop their training questions, or split all questions anew by picture."""
    test_fraction: float = 0.2
    """Share of the pictures that `leakage: resplit` gives to the test split."""
    max_train: int | None = None
    """Training questions kept at most, chosen by a hash of their ids; none: all."""
    max_test: int | None = None
    """Test questions kept at most, chosen by a hash of their ids; none: all. Official tests are not counted."""
    seed: int = 0
    """Seed of the new split (`leakage: resplit`) and of the choice under `max_train` and `max_test`."""
    batch_size: int = execution(64, ge=1)
    """Images that a worker opens at a time."""
    num_cpus: float = execution(0.5)
    """Logical CPU cores that an image worker asks for."""

    @model_validator(mode="after")
    def _reviewed_by_somebody(self) -> "CurateConfig":
        if self.written == "reviewed" and not self.reviews:
            raise ValueError(
                "written is 'reviewed' and reviews is empty: read them with python -m jobs.review_page recipe.yaml "
                "what=questions, then name what its --export prints"
            )
        return self
