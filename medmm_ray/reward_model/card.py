"""The model card: what a reader of the folder, or of its page on the hub, has to know."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medmm_ray.reward_model import families

CODE = """```python
from medmm_ray.reward_model import RewardModel

model = RewardModel.from_pretrained("{name}")
scores = model.score(
    "Which side shows the effusion? (A) left (B) right",
    ["Step 1: The left costophrenic angle is blunted. Step 2: So the answer is (A).", ["No blunting.", "So (B)."]],
    documents=["A pleural effusion blunts the costophrenic angle on its side."],{image}
)
scores[0].plus_probs  # a probability for each step
scores[0].log_odds  # rank by these: probabilities saturate and tie
```"""


_FRONT_MATTER = ["library_name", "tags", "base_model", "datasets", "license", "license_name"]  # in this order
UNKNOWN = "No figures were given when this model was saved. Measure it on data of your own before you rely on it."
LICENCE = (
    "The weights are derived from the models named above and stand under their licences, all of them; see their pages. "
    "The code that reads them is under Apache-2.0."
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A share of questions answered rightly, with its 95 % interval where it has one."""

    data_set: str
    hub_id: str
    """The data set's repository, empty where it has none."""
    split: str
    rule: str
    """How the answer was chosen."""
    questions: int
    value: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> str:
        """Both ends in percent, empty without."""
        return "" if self.low is None or self.high is None else f"{100 * self.low:.1f} to {100 * self.high:.1f}"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What is known of a model beside its checkpoint when it is released."""

    datasets: Sequence[str]
    """Hub ids of what it was trained on."""
    measured: Sequence[Measured]
    license: str
    """As the hub spells it; empty: that of the base models."""
    sections: Mapping[str, str]
    """Further sections by their titles."""


def write(name: str, described: Mapping[str, Any], publication: Publication | None = None) -> str:
    """The card of a model called `name` (a hub id, or a folder's name), from what `checkpoint` says of it."""
    text, image, figures = described["text_tower"], described["image_tower"], described["figures"]
    sources = [text["source"]]
    rows = [("text tower", text["architecture"], _linked(text["source"]), f"`{text['revision']}`")]
    if image:
        size = f"{image['image_size']} pixels, width {image['width']}"
        rows.append(("image tower", size, _linked(image["source"]), f"`{image['revision']}`"))
        sources.append(image["source"])
    facts = [
        f"Input: the family `{described['family']}`. {families.about(described['family'])}",
        f"At most {described['max_length']:,} tokens, {described['reserve']:,} of them kept free of documents.",
    ]
    if described["fusion"]:
        settings = ", ".join(f"{key} {value}" for key, value in described["fusion"].items())
        facts.append(f"Image part: {settings}.")
    title = name.rpartition("/")[2]
    parts = [
        _front_matter(title, sources, publication),
        f"# {title}",
        "A process reward model for medicine: it reads a question, documents"
        f"{', images' if image else ''} and a step-by-step solution, and says of every step how likely it is right, as"
        " log-odds. It serves to rank several solutions of one question (best-of-N).",
        "## How to use it",
        CODE.format(name=name, image="\n    image=picture,  # a PIL image" if image else ""),
        _usage(image is not None),
        "## What it is made of",
        _table(("part", "", "started from", "revision"), rows),
        "A revision is the hub's commit or, of a model that came from a folder, a hash of its weights.",
        "\n".join(f"- {fact}" for fact in facts),
        "## Measured",
        _figures(figures, publication.measured if publication else ()),
        "## Limits",
        _limits(image is not None),
        "## Licence",
        LICENCE,
    ]
    if publication:
        for heading, content in publication.sections.items():
            parts += [f"## {heading}", content]
    return "\n\n".join(parts) + "\n"


def _figures(figures: Mapping[str, float], measured: Sequence[Measured]) -> str:
    """The tables of what was measured on questions, and of the training's own figures."""
    tables = []
    if measured:
        rows = []
        for figure in measured:
            value = f"{100 * figure.value:.1f} %"
            rows.append((figure.data_set, figure.rule, f"{figure.questions:,}", value, figure.interval))
        tables.append(_table(("data set", "answer chosen by", "questions", "right", "95 % interval"), rows))
    if figures:
        tables.append(_table(("figure", "value"), [(key, f"{value:.4g}") for key, value in figures.items()]))
    return "\n\n".join(tables) or UNKNOWN


def _front_matter(title: str, sources: Sequence[str], publication: Publication | None) -> str:
    """What the hub's page reads of the card."""
    from huggingface_hub import EvalResult, ModelCardData

    ids = [hub_id(source) for source in sources]
    results = []
    for figure in publication.measured if publication else ():
        interval = f" (95 % interval {figure.interval})" if figure.interval else ""
        result = EvalResult(
            task_type="question-answering",
            dataset_type=figure.hub_id or figure.data_set,
            dataset_name=figure.data_set,
            dataset_split=figure.split,
            metric_type="accuracy",
            metric_name=f"{figure.rule}{interval}",
            metric_value=round(figure.value, 6),
        )
        results.append(result)
    licence = publication.license if publication else ""
    data = ModelCardData(
        library_name="transformers",
        tags=["process-reward-model", "medical"],
        base_model=[name for name in ids if name] or None,
        datasets=list(publication.datasets) if publication and publication.datasets else None,
        license=licence or "other",
        license_name=None if licence else "that-of-the-base-models",
        model_name=title if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml(original_order=_FRONT_MATTER)}\n---"


def hub_id(source: str) -> str | None:
    """``org/name`` of a source on the hub, None for a local one."""
    name = source.removeprefix("hf-hub:")
    return name if name.count("/") == 1 else None


def _linked(source: str) -> str:
    name = hub_id(source)
    return f"[{name}](https://huggingface.co/{name})" if name else f"`{source}`"


def _usage(has_image: bool) -> str:
    needs = "torch, transformers and open_clip" if has_image else "torch and transformers"
    text = (
        f"The package is `medmm-ray`; this needs {needs} of it. The folder is also a checkpoint of the text tower alone"
    )
    if not has_image:
        return f"{text}."
    return (
        f"{text}; the image tower lies in `image_tower/`. `text_log_odds + image_log_odds` are the scores, exactly:"
        " each step says how much the picture spoke for it, and without a picture the image's part is 0."
    )


def _limits(has_image: bool) -> str:
    lines = [
        "For research. No medical device: it must not decide about a patient.",
        "A high score says that a step reads like the right steps it was trained on, not that it is true.",
        "Probabilities are only as calibrated as the figures above say; ranks within one question mean the most.",
        "Compare scores of one question and the same documents, not of different questions.",
    ]
    if has_image:
        lines.append("Images of other kinds than it was trained on get numbers too, without a warning.")
    return "\n".join(f"- {line}" for line in lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
