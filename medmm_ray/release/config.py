"""What of a run is released, to whom, and in whose words."""

from typing import Literal

from pydantic import Field

from medmm_ray.config import Config, execution

Part = Literal["model", "dataset"]


class ReleaseConfig(Config):
    """A release: a model and a dataset with their cards, reports, figures, a list of what there is, and checksums."""

    to: str = execution("")
    """Folder or URI of the release; empty: release in the run's folder. What a release left there is replaced."""
    parts: tuple[Part, ...] = ("model", "dataset")
    """What is released."""
    private: bool = False
    """Whether only those may read it who may read its sources: then no licence stops it."""
    exclude: tuple[str, ...] = ()
    """Data sets and corpora that stay behind: their questions, pictures and texts."""
    licences: dict[str, str] = Field({})
    """Licences of your own data and of corpora by their names, as the hub spells them (cc-by-4.0), where python -m
    jobs.datasets does not have them."""
    license: str = ""
    """Licence of what the run itself made (solutions, labels, drawn pictures), as the hub spells it; empty: asked."""
    model_license: str = ""
    """Licence of the model, as the hub spells it; empty: that of its base models."""
    answers: dict[str, str] = Field({})
    """Your answers to what the datasheet asks and no run knows, by the names that the release lists."""
    questions_per_shard: int = execution(256, ge=1)
    """Questions of one Parquet file of the dataset."""
    push: str = ""
    """Name (org/name) of the hub's repositories that it goes to, a model and a dataset; empty: it stays here."""
