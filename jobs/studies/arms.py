"""What the image part should look at: every arm of stage two_tower on hard phantoms, over several seeds.

An arm is trained by the real stage on the same cached states and image tower as all others of its seed, and measured on
test questions that nothing was trained or selected on: AUROC of the steps, and best-of-N (the solution with the highest
minimum of its steps' log-odds). The baseline of both is the text alone.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table as Grid

from jobs.benches import Measured
from jobs.studies.published import PublishedStage
from jobs.studies.study import Study, StudyConfig, prepare, start_alone, train, train_tower
from medmm_ray.stats.decoders import aggregate, expected_best, expected_oracle
from medmm_ray.stats.metrics import auroc
from medmm_ray.train.progress import HISTORY
from medmm_ray.train.stage import StageFactory
from medmm_ray.train.text_prm_data import group_labels
from medmm_ray.train.two_tower import TwoTowerConfig, TwoTowerStage
from medmm_ray.train.two_tower_data import located_states, questions_with_images, states_files

if TYPE_CHECKING:
    from medmm_ray.reward_model import Fusion, ImageFeatures

TEXT = "text only"
PUBLISHED = "published plan"
# What each arm's settings have besides the common ones: without references, unless said.
ARMS: dict[str, dict[str, Any]] = {
    PUBLISHED: {},
    "pooled": {"tokens": "pooled", "summary": False},
    "patches": {"tokens": "patches", "summary": False},
    "both": {"tokens": "both", "summary": False},
    "pooled + summary": {"tokens": "pooled"},
    "patches + summary": {"tokens": "patches"},
    "both + summary": {"tokens": "both"},
    "pooled + summary + references": {"tokens": "pooled", "num_references": 3},
    "both + summary + references": {"tokens": "both", "num_references": 3},
    "pooled + summary + 25 % swapped": {"tokens": "pooled", "swapped_share": 0.25},
}


class BenchConfig(StudyConfig):
    """The study, and how its arms are trained."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Studies: each draws its own pictures, questions, solutions and first weights."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms that are trained."""
    epochs: int = 8
    """Epochs of an arm."""
    learning_rate: float = 1e-3
    """Highest learning rate of an arm."""
    batch_size: int = 64
    """Solutions of an update."""
    folder: str | None = None
    """Where image tower and figures of each seed are kept, so that an interrupted run goes on; null: nowhere."""
    figure: str | None = None
    """Where a chart of the arms is drawn (.png or .svg); null: nowhere."""


@dataclass(frozen=True)
class Figures:
    """What an arm is worth: step AUROC, and the share of test questions that its best solution answers rightly."""

    step_auroc: float
    best_of_n: float


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Train and measure every arm, seed by seed; a row each for its step AUROC and its best-of-N."""
    unknown = set(config.arms) - set(ARMS)
    if unknown:
        raise ValueError(f"there is no arm {sorted(unknown)[0]!r}; expected some of {', '.join(ARMS)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(config.folder or scratch)
        studies = [_figures(config, seed, folder) for seed in config.seeds]
    arms: dict[str, list[Figures]] = {}
    for arm in (TEXT, *config.arms):
        arms[arm] = [Figures(**study["arms"][arm]) for study in studies]
    one_sample = mean(study["one_sample"] for study in studies)
    oracle = mean(study["oracle"] for study in studies)
    console.print(_grid(arms, config.samples))
    console.print(f"one sample is right in {one_sample:.1%}, one of {config.samples} in {oracle:.1%}")
    if config.figure:
        draw(arms, one_sample, oracle, config.samples, config.figure)
    for arm in config.arms:
        for key, unit in (("step_auroc", "AUROC"), ("best_of_n", "share")):
            values = _values(arms[arm], key)
            baseline = mean(_values(arms[TEXT], key))
            ours = mean(values)
            figure_name = _NAMES[key].format(config.samples)
            spread = f"± {_spread(values):.3f} over {len(values)} seeds"
            yield Measured(f"arms, {arm}: {figure_name} ({spread})", baseline, ours, ours / baseline, "", unit)


_NAMES = {"step_auroc": "step AUROC", "best_of_n": "best-of-{}"}


def _values(figures: Sequence[Figures], key: str) -> list[float]:
    return [arm.step_auroc if key == "step_auroc" else arm.best_of_n for arm in figures]


def _spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds; 0 of one."""
    return stdev(values) if len(values) > 1 else 0.0


def _figures(config: BenchConfig, seed: int, folder: Path) -> dict[str, Any]:
    """One seed's figures: of each arm, of one sample, and of the oracle; those that are there, or measured now."""
    path = folder / f"seed-{seed}.json"
    if path.is_file():
        earlier: dict[str, Any] = json.loads(path.read_text())
        if set(config.arms) <= set(earlier["arms"]):
            return earlier
    # A process a seed: DeepSpeed holds on to what it finds in the first group of a process.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start_alone) as process:
        figures = process.submit(_measured, config, seed, folder / "image_tower").result()
    path.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def _measured(config: BenchConfig, seed: int, tower: Path) -> dict[str, Any]:
    """In a process of its own, which is a training group of one."""
    torch.set_num_threads(config.threads)
    say = partial(print, flush=True)
    if not (tower / HISTORY).is_file():
        say(f"training the image tower on {config.tower_images:,} pictures x {config.tower_epochs}")
        train_tower(config, tower)
    with tempfile.TemporaryDirectory() as folder:
        return compare(config, seed, prepare(config, seed, Path(folder), tower, say), say)


def compare(config: BenchConfig, seed: int, study: Study, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and measure the arms of one study."""
    test = Test.of(study, config.references)
    arms = {TEXT: test.figures(None)}
    for number, arm in enumerate(config.arms):
        settings = _arm_config(config, seed, arm)
        files = states_files([study.states])
        rows = questions_with_images(
            pa.concat_tables(located_states(files)),
            group_labels([study.labels]),
            study.questions,
            study.images,
            study.evidence,
            study.solutions,
            settings.label_policy,
            settings.after_first_error,
            settings.num_references,
        )
        inputs = {"text_prm": study.text_prm, "image_tower": study.image_tower}
        for name, table in (("questions", rows), ("files", files)):
            inputs[name] = str(study.folder / f"arm-{number}-{name}.parquet")
            pq.write_table(table, inputs[name])
        factory: StageFactory = PublishedStage if arm == PUBLISHED else TwoTowerStage
        stage = train(factory, settings, inputs, study.folder / f"arm-{number}")
        assert isinstance(stage, TwoTowerStage)
        arms[arm] = test.figures(stage.fusion.eval(), settings.num_references)
        say(f"seed {seed}, {arm}: step AUROC {arms[arm].step_auroc:.3f}, best-of-n {arms[arm].best_of_n:.1%}")
    figures = {arm: asdict(arm_figures) for arm, arm_figures in arms.items()}
    return {"one_sample": test.one_sample, "oracle": test.oracle, "arms": figures}


def _arm_config(config: BenchConfig, seed: int, arm: str) -> TwoTowerConfig:
    settings: dict[str, Any] = {
        "seed": seed,
        "label_policy": "judge",
        "after_first_error": "keep",
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "threads": config.threads,
        "num_references": 0,
    }
    return TwoTowerConfig(**{**settings, **ARMS[arm]})


@dataclass(frozen=True)
class Sample:
    """A solution of a test question: the text tower's part, the truth of its steps, whether its answer is right."""

    states_TD: torch.Tensor
    summaries_TD: torch.Tensor
    text_T: torch.Tensor
    labels: list[int | None]
    correct: bool


@dataclass(frozen=True)
class Test:
    """The test questions: their samples, and how `k` references and their own pictures look to the image tower."""

    questions: list[list[Sample]]
    features: Callable[[int], "list[ImageFeatures]"]
    head_D: torch.Tensor
    one_sample: float
    oracle: float

    @classmethod
    def of(cls, study: Study, most_references: int) -> "Test":
        """The test questions of a study."""
        from medmm_ray.reward_model import RewardModel

        labels_by_solution: dict[str, list[int | None]] = {}
        for row in study.labels.to_pylist():
            labels_by_solution[row["solution_id"]] = [step["label"] for step in row["steps"]]
        questions: list[list[Sample]] = []
        for row in study.solutions.to_pylist():
            if row["question_id"] not in study.test:
                continue
            samples: list[Sample] = []
            for solution, state in zip(row["solutions"], study.test[row["question_id"]], strict=True):
                labels = labels_by_solution[solution["solution_id"]]
                samples.append(
                    Sample(state.states_TD, state.summaries_TD, state.log_odds_T, labels, solution["correct"])
                )
            questions.append(samples)
        model = RewardModel.from_pretrained(study.text_prm)
        with torch.no_grad():
            head_D = model.head_log_odds(torch.eye(model.hidden_size))
        one_samples: list[float] = []
        oracles: list[float] = []
        for samples in questions:
            is_correct = np.array([sample.correct for sample in samples])
            one_samples.append(float(is_correct.mean()))
            oracles.append(expected_oracle(is_correct, len(is_correct)))
        features = _features(study, most_references)
        return cls(questions, features, head_D, mean(one_samples), mean(oracles))

    @torch.no_grad()
    def figures(self, fusion: "Fusion | None", num_references: int = 0) -> Figures:
        """The figures of a trained image part, or of the text alone, on the test questions."""
        scores: list[float] = []
        is_right: list[bool] = []
        best: list[float] = []
        for samples, features in zip(self.questions, self.features(num_references), strict=True):
            log_odds_T = _joined(samples, "text_T")
            if fusion is not None:
                delta_TD = fusion(_joined(samples, "states_TD"), _joined(samples, "summaries_TD"), features)
                log_odds_T = log_odds_T + delta_TD @ self.head_D
            rewards: list[float] = []
            correct: list[bool] = []
            num_steps = [len(sample.labels) for sample in samples]
            for sample, solution_T in zip(samples, torch.split(log_odds_T, num_steps), strict=True):
                log_odds = solution_T.tolist()
                rewards.append(aggregate(log_odds))
                correct.append(sample.correct)
                for score, label in zip(log_odds, sample.labels, strict=True):
                    if label is not None:
                        scores.append(score)
                        is_right.append(label == 1)
            best.append(expected_best(np.array(rewards), np.array(correct), len(samples)))
        value = auroc(np.array(is_right), np.array(scores))
        assert value is not None, "the test questions have no right step, or no wrong one"
        return Figures(value, mean(best))


def _joined(samples: Sequence[Sample], field: str) -> torch.Tensor:
    """A field of all samples, one behind the other."""
    return torch.cat([getattr(sample, field) for sample in samples])


def _features(study: Study, most_references: int) -> "Callable[[int], list[ImageFeatures]]":
    """The image tower's tokens of each test question's picture and its first references."""
    from medmm_ray.engines.image_tower import ImageTokens, ImageTower
    from medmm_ray.engines.images import open_image
    from medmm_ray.reward_model import ImageFeatures

    tower = ImageTower.from_pretrained(study.image_tower)
    uris = {row["image_id"]: row["uri"] for row in study.images.to_pylist()}
    reference_uris: dict[str, list[str]] = {}
    for row in study.evidence.to_pylist():
        reference_uris[row["question_id"]] = [image["uri"] for image in row["images"]]
    own_uri = {row["question_id"]: uris[row["image_ids"][0]] for row in study.questions.to_pylist()}
    tokens: list[ImageTokens] = []
    for question_id in study.test:
        question_uris = [own_uri[question_id], *reference_uris[question_id][:most_references]]
        pixels = [tower.preprocess(open_image(uri)) for uri in question_uris]
        with torch.no_grad():
            tokens.append(tower(torch.stack(pixels)))

    def features(num_references: int) -> list[ImageFeatures]:
        number = min(num_references, most_references)
        references = [list(range(1, 1 + number))]
        return [ImageFeatures.gather(t.pooled_BD, t.patches_BPD, [[0]], references) for t in tokens]

    return features


def _grid(arms: Mapping[str, Sequence[Figures]], samples: int) -> Grid:
    """Means and standard deviations over seeds, for a screen."""
    grid = Grid("arm", box=None, pad_edge=False, header_style="bold")
    for column in ("step AUROC", f"best-of-{samples}"):
        grid.add_column(column, justify="right")
    for arm, figures in arms.items():
        step, best = _values(figures, "step_auroc"), _values(figures, "best_of_n")
        step_cell = f"{mean(step):.3f} ± {_spread(step):.3f}"
        best_cell = f"{100 * mean(best):.1f} ± {100 * _spread(best):.1f} %"
        grid.add_row(arm, step_cell, best_cell)
    return grid


def draw(arms: Mapping[str, Sequence[Figures]], one_sample: float, oracle: float, samples: int, path: str) -> None:
    """A chart: each arm's mean, its standard deviation over seeds as a bar, each seed as a dot."""
    from matplotlib.figure import Figure

    from medmm_ray.pages.svg import BLUE, GREY, GRID, INK, ORANGE

    figure = Figure(figsize=(10, 0.42 * len(arms) + 1.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    places = list(range(len(arms), 0, -1))
    for panel, key, colour in ((panels[0], "step_auroc", BLUE), (panels[1], "best_of_n", ORANGE)):
        for place, figures in zip(places, arms.values(), strict=True):
            values = _values(figures, key)
            panel.errorbar(mean(values), place, xerr=_spread(values), fmt="o", color=colour, capsize=4, markersize=6)
            panel.plot(values, [place] * len(values), "|", color=INK, markersize=9, alpha=0.6)
        panel.grid(axis="x", color=GRID)
        panel.set_axisbelow(True)
        for spine in ("top", "right", "left"):
            panel.spines[spine].set_visible(False)
        panel.tick_params(left=False)
        panel.set_title(_NAMES[key].format(samples), color=INK)
    for value, words, side in ((one_sample, " one sample", "left"), (oracle, "oracle ", "right")):
        panels[1].axvline(value, color=GREY, linestyle=":")
        panels[1].text(value, places[0] + 0.5, words, color=GREY, ha=side, va="center", fontsize=9)
    panels[0].set_yticks(places, list(arms))
    panels[0].set_ylim(0.5, len(arms) + 0.8)
    figure.savefig(path, dpi=150)
