"""Tables -> figures: what the scorer is worth, as one plain dict (``report.json``); every share is in [0, 1].

Enter: questions, images, solutions, scores, labels and what the run says of itself. Leave: `evaluate`'s report.

What counts: the questions of one split whose own row has no error (the others are counted under `counts.excluded`). A
question without solutions, or without one scored solution, counts as wrong and is counted; a solution without an answer
or without a score keeps its place among the N (`metrics` says what that means). Step metrics take their truth from one
source for the whole report, the first of `reference` that has labels in the split; nulls stay out.
"""

import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray import metrics
from medmm_ray.config import Config, digest, execution, identity
from medmm_ray.metrics import Aggregate, Bools, Floats, Ints
from medmm_ray.tables import Manifest, code_revision, error_kind, package_versions

Row = dict[str, Any]
ARMS = ("text_only", "multimodal", "shuffled_image")


class EvaluateConfig(Config):
    split: str = "test"
    """The split that is measured."""
    ns: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of samples N; those above what was sampled fall away."""
    aggregate: Aggregate = "min"
    """What makes a solution's reward of its steps: min (Med-PRM), last, mean (VisualPRM), product, gmean."""
    reference: tuple[str, ...] = ("phantom", "expert", "judge")
    """Label sources that may serve as the truth of step metrics; the first that has labels in the split does."""
    threshold: float = 0.5
    """Probability from which a step is called right, in macro-F1, kappa and first errors."""
    calibration_bins: int = 10
    """Bins of equal width of the calibration curve and of the ECE (weighted by count)."""
    bootstrap_samples: int = 2000
    """Resamples of the questions for the 95 % intervals."""
    num_subsets: int = 128
    """Random subsets a question and N over which votes are averaged; all subsets where there are no more."""
    max_groups: int = 12
    """A table by question text is made where there are at most this many different texts."""
    num_examples: int = 6
    """Example cases."""
    seed: int = 0
    """Seed of subsets, bootstrap and choice of examples."""
    title: str = execution("Process reward model: report")
    """Title of the report."""


@dataclass(frozen=True)
class _Case:
    """One question with its samples: arrays over M solutions; rewards by arm, NaN where there is no score."""

    row: Row
    solution_ids: list[str] = field(default_factory=list)
    codes: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    correct: Bools = field(default_factory=lambda: np.empty(0, np.bool_))
    rewards: dict[str, Floats] = field(default_factory=dict)
    seed: int = 0


def evaluate(
    config: EvaluateConfig,
    *,
    questions: pa.Table,
    images: pa.Table,
    solutions: pa.Table,
    scores: pa.Table,
    labels: Sequence[pa.Table],
    review_queue: pa.Table | None = None,
    steps: Sequence[Row] = (),
    environment: Row | None = None,
) -> Row:
    """The report. `labels` are label tables of any sources and splits; `steps` as `step_entries` makes them.

    Raises ValueError where a scored solution has another number of scores than steps.
    """
    asked = questions.filter(pc.equal(questions["split"], config.split)).sort_by("question_id")
    faulty = [e for e in asked["error"].to_pylist() if e]
    asked = asked.filter(pc.is_null(asked["error"]))
    solutions = _of(solutions, asked)
    sampled = _samples(solutions)
    log_odds = _step_log_odds(_of(scores, asked), sampled)
    arms = [arm for arm in ARMS if arm in log_odds] + sorted(set(log_odds) - set(ARMS))
    cases = [_case(config, row, sampled.get(row["question_id"]), log_odds, arms) for row in asked.to_pylist()]
    ns = _ns(config, cases, solutions)
    label_sets = _labels(labels)
    in_split = {i for case in cases for i in case.solution_ids}
    reference = _reference(config, label_sets, in_split)
    truth = {i: y for i, y in label_sets.get(reference, {}).items() if i in in_split}
    figures = _figures(config, cases, arms, ns)
    return {
        "title": config.title,
        "config": identity(config),
        "n": ns[-1],
        "ns": ns,
        "arms": arms,
        "reference": reference,
        "counts": _counts(config, cases, arms, ns[-1], faulty, {"solutions": solutions, "scores": scores}, labels),
        "accuracy": _nest(config, figures, ns),
        "decoders": _decoders(config, cases, arms, log_odds),
        "step": {arm: _step_metrics(config, log_odds[arm], truth) for arm in arms},
        "checks": {"largest_text_difference": _text_difference(_of(scores, asked))},
        "labels": _label_counts(labels),
        "agreement": _agreement(label_sets, review_queue),
        "by_difficulty": _by(config, cases, arms, ns[-1], "difficulty"),
        "by_modality": _by(config, cases, arms, ns[-1], "modality"),
        "by_question": _by(config, cases, arms, ns[-1], "question"),
        "steps": list(steps),
        "environment": dict(environment or {}),
        "examples": _examples(config, cases, arms, solutions, images, _of(scores, asked), truth),
    }


# Reading the tables


def _of(table: pa.Table, asked: pa.Table) -> pa.Table:
    return table.filter(pc.is_in(table["question_id"], asked["question_id"].combine_chunks()))


def _entries(table: pa.Table, column: str, names: Sequence[str]) -> list[list[Row]]:
    """A list<struct> column as lists of dicts of `names` only: the texts of a large run stay in Arrow."""
    lists = table[column].combine_chunks()
    flat = lists.flatten()
    values = [flat.field(name).to_pylist() for name in names]
    rows = [dict(zip(names, entry, strict=True)) for entry in zip(*values, strict=True)]
    ends = np.cumsum(pc.list_value_length(lists).to_pylist(), dtype=np.int64)
    return [rows[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _samples(solutions: pa.Table) -> dict[str, list[Row]]:
    """By question: its solutions' id, answer, correct; a row with an error has none."""
    entries = _entries(solutions, "solutions", ("solution_id", "answer", "correct", "steps"))
    rows = zip(solutions["question_id"].to_pylist(), entries, strict=True)
    return {q: [{**e, "steps": len(e["steps"])} for e in found] for q, found in rows}


def _step_log_odds(scores: pa.Table, sampled: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Floats]]:
    """By arm and solution: text part + image part of each step, of the rows without an error."""
    num_steps = {s["solution_id"]: s["steps"] for found in sampled.values() for s in found}
    by_arm: dict[str, dict[str, Floats]] = {arm: {} for arm in pc.unique(scores["arm"]).to_pylist()}
    names = ("solution_id", "arm", "text_log_odds", "image_log_odds", "error")
    for solution, arm, text, image, error in zip(*(scores[name].to_pylist() for name in names), strict=True):
        if error or solution not in num_steps:
            continue
        if not len(text) == len(image) == num_steps[solution]:
            raise ValueError(
                f"solution {solution}, arm {arm}: {len(text)} text and {len(image)} image scores for "
                f"{num_steps[solution]} steps; expected one each a step. Score the solutions again."
            )
        by_arm[arm][solution] = np.asarray(text, dtype=np.float64) + np.asarray(image, dtype=np.float64)
    return by_arm


def _case(
    config: EvaluateConfig,
    row: Row,
    found: Sequence[Row] | None,
    log_odds: Mapping[str, Mapping[str, Floats]],
    arms: Sequence[str],
) -> _Case:
    if not found:
        return _Case(row, rewards={arm: np.empty(0) for arm in arms})
    ids = [s["solution_id"] for s in found]
    rewards = {}
    for arm in arms:
        steps = (log_odds[arm].get(i) for i in ids)
        rewards[arm] = np.array([math.nan if x is None else metrics.aggregate(x, config.aggregate) for x in steps])
    return _Case(
        row,
        ids,
        metrics.answer_codes([s["answer"] for s in found]),
        np.array([bool(s["correct"]) for s in found]),
        rewards,
        int(digest(config.seed, row["question_id"]), 16) % 2**40,
    )


def _ns(config: EvaluateConfig, cases: Sequence[_Case], solutions: pa.Table) -> list[int]:
    """The N of the config up to the largest number of samples, and that number."""
    largest = max((len(case.solution_ids) for case in cases), default=0)
    if not largest:
        raise ValueError(
            f"no question of split {config.split!r} has a solution ({len(cases)} questions, {solutions.num_rows} rows "
            "of solutions): nothing to evaluate. Look at the error column of the solutions, or name another split."
        )
    requested = max(solutions["num_requested"].to_pylist())
    most = min(max(largest, min(config.ns)), requested)
    return sorted({n for n in config.ns if n <= most} | ({most} if most < max(config.ns) else set()))


# Accuracy


def _figures(
    config: EvaluateConfig, cases: Sequence[_Case], arms: Sequence[str], ns: Sequence[int]
) -> dict[tuple[str, ...], Floats]:
    """One value a question, in expectation, by path: (majority, 64), (best_of_n, multimodal, 64), …"""
    figures: dict[tuple[str, ...], list[float]] = {}

    def add(value: float, *path: str) -> None:
        figures.setdefault(path, []).append(value)

    for case in cases:
        add(float(case.correct.mean()) if case.correct.size else 0.0, "one_sample")
        for n in ns:
            at = str(n)
            drawn = metrics.subsets(case.codes.size, n, config.num_subsets, case.seed) if case.codes.size else None
            add(metrics.expected_oracle(case.correct, n), "oracle", at)
            add(metrics.expected_vote(case.codes, case.correct, drawn), "majority", at)
            for arm in arms:
                add(metrics.expected_best(case.rewards[arm], case.correct, n), "best_of_n", arm, at)
                voted = metrics.expected_vote(case.codes, case.correct, drawn, case.rewards[arm])
                add(voted, "sc_rm", arm, at)
    columns = {path: np.array(values) for path, values in figures.items()}
    if {"multimodal", "text_only"} <= set(arms):
        for how in ("best_of_n", "sc_rm"):
            for at in map(str, ns):
                columns["gain", how, at] = columns[how, "multimodal", at] - columns[how, "text_only", at]
    return columns


def _nest(config: EvaluateConfig, figures: Mapping[tuple[str, ...], Floats], ns: Sequence[int]) -> Row:
    """{value, low, high} of each figure, nested by its path."""
    values = np.stack(list(figures.values()), axis=1)
    low, high = metrics.bootstrap(values, config.bootstrap_samples, config.seed)
    nested: Row = {}
    for column, path in enumerate(figures):
        node = nested
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _interval(float(values[:, column].mean()), low[column], high[column])
    return nested


def _interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": round(value, 6), "low": round(float(low), 6), "high": round(float(high), 6)}


def _decoders(
    config: EvaluateConfig,
    cases: Sequence[_Case],
    arms: Sequence[str],
    log_odds: Mapping[str, Mapping[str, Floats]],
) -> Row:
    """Every named decoder over all samples of each question, by arm."""
    table: Row = {}
    for arm in arms:
        figures: dict[tuple[str, ...], list[float]] = {(name,): [] for name in metrics.DECODERS}
        for case in cases:
            steps = [log_odds[arm].get(i) for i in case.solution_ids]
            rewards = {
                how: np.array([math.nan if x is None else metrics.aggregate(x, how) for x in steps])
                for how in {d.aggregate for d in metrics.DECODERS.values()}
                if how
            }
            everything = np.ones((1, len(steps)), dtype=bool)
            for name, rule in metrics.DECODERS.items():
                reward = rewards[rule.aggregate] if rule.aggregate else None
                if rule.rule == "best":
                    assert reward is not None
                    right = metrics.expected_best(reward, case.correct, max(len(steps), 1))
                else:
                    right = metrics.expected_vote(case.codes, case.correct, everything, reward, rule.rule)
                figures[name,].append(right)
        table[arm] = _nest(config, {path: np.array(v) for path, v in figures.items()}, ())
    return table


def _by(config: EvaluateConfig, cases: Sequence[_Case], arms: Sequence[str], n: int, column: str) -> Row:
    """Accuracy at the largest N by the values of a question's column; empty where it does not divide the questions."""
    groups: dict[str, list[_Case]] = {}
    for case in cases:
        groups.setdefault(case.row[column], []).append(case)
    if column == "question" and not 1 < len(groups) <= config.max_groups:
        return {}
    table = {}
    for name in sorted(groups, key=_difficulty_order):
        nested = _nest(config, _figures(config, groups[name], arms, [n]), [n])
        table[name] = {"questions": len(groups[name]), **_at(nested, str(n))}
    return table


def _difficulty_order(name: str) -> tuple[int, str]:
    known = ("easy", "medium", "hard")
    return (known.index(name) if name in known else len(known), name)


def _at(node: Row, at: str) -> Row:
    """The figures of one N: {majority: {"64": x}} -> {majority: x}."""
    if at in node:
        return node[at]  # type: ignore[no-any-return]
    return {key: _at(value, at) if isinstance(value, dict) and "value" not in value else value for key, value in node.items()}  # fmt: skip


# Steps


def _step_metrics(config: EvaluateConfig, log_odds: Mapping[str, Floats], truth: Mapping[str, Sequence[int | None]]) -> Row:  # fmt: skip
    """Pooled over the labelled steps of scored solutions; first errors are sought among labelled steps only."""
    pooled_labels: list[int] = []
    pooled_scores: list[float] = []
    first_true, first_called = [], []
    for solution in sorted(truth.keys() & log_odds.keys()):
        kept = [(y, x) for y, x in zip(truth[solution], log_odds[solution], strict=True) if y is not None]
        if kept:
            labels_here, scores_here = zip(*kept, strict=True)
            pooled_labels += labels_here
            pooled_scores += scores_here
            first_true.append(metrics.first_error(labels_here))
            first_called.append(metrics.first_error(metrics.predicted_right(scores_here, config.threshold).tolist()))
    y, x = np.array(pooled_labels, dtype=bool), np.array(pooled_scores, dtype=np.float64)
    p = metrics.probability(x)
    called = metrics.predicted_right(x, config.threshold)
    bins = metrics.calibration(y, p, config.calibration_bins)
    false, true = metrics.roc_curve(y, x)
    same = [a == b for a, b in zip(first_true, first_called, strict=True)]
    return {
        "steps": int(y.size),
        "right": int(y.sum()),
        "wrong": int((~y).sum()),
        "solutions": len(first_true),
        "threshold": config.threshold,
        "auroc": metrics.auroc(y, x),
        "macro_f1": metrics.macro_f1(y, called),
        "ece": metrics.expected_calibration_error(bins),
        "kappa": metrics.cohen_kappa(y, called),
        "first_error": sum(same) / len(same) if same else None,
        "processbench": metrics.processbench_f1(first_true, first_called),
        "minimum_on_last_step": metrics.minimum_on_last_step([v.tolist() for v in log_odds.values()]),
        "calibration": [asdict(b) for b in bins],
        "roc": {"false": false, "true": true},
        "histogram": metrics.histogram(y, p),
    }


def _text_difference(scores: pa.Table) -> float | None:
    """The largest difference between the multimodal arm's text part and the text-only scores; None without both."""
    by_arm: dict[str, dict[str, list[float]]] = {}
    for arm in ("text_only", "multimodal"):
        rows = scores.filter(pc.and_(pc.equal(scores["arm"], arm), pc.is_null(scores["error"])))
        pairs = zip(rows["solution_id"].to_pylist(), rows["text_log_odds"].to_pylist(), strict=True)
        by_arm[arm] = dict(pairs)
    shared = by_arm["text_only"].keys() & by_arm["multimodal"].keys()
    gaps = [np.abs(np.subtract(by_arm["text_only"][i], by_arm["multimodal"][i])).max() for i in shared]
    return float(max(gaps)) if gaps else None


# Labels


def _labels(tables: Iterable[pa.Table]) -> dict[str, dict[str, list[int | None]]]:
    """By source and solution: the label of each step; of several annotators the first (by name) that labels a step."""
    found: dict[str, dict[str, list[int | None]]] = {}
    for table in tables:
        kept = table.filter(pc.is_null(table["error"])).sort_by("annotator")
        entries = _entries(kept, "steps", ("label",))
        for solution, source, row in zip(
            kept["solution_id"].to_pylist(), kept["source"].to_pylist(), entries, strict=True
        ):
            own = [entry["label"] for entry in row]
            before = found.setdefault(source, {}).setdefault(solution, own)
            if len(before) != len(own):
                raise ValueError(
                    f"solution {solution}: the {source} labels have {len(before)} and {len(own)} steps; expected one "
                    "entry a step. Label it again."
                )
            found[source][solution] = [b if a is None else a for a, b in zip(before, own, strict=True)]
    return found


def _reference(
    config: EvaluateConfig, label_sets: Mapping[str, Mapping[str, Sequence[int | None]]], in_split: set[str]
) -> str:
    for source in config.reference:
        for solution, found in label_sets.get(source, {}).items():
            if solution in in_split and any(y is not None for y in found):
                return source
    return ""


def _label_counts(tables: Iterable[pa.Table]) -> Row:
    """By source: rows, steps labelled + and -, nulls, failed rows, cost in US dollars."""
    counts: dict[str, Counter[str]] = {}
    cost: Counter[str] = Counter()
    for table in tables:
        columns = ("source", "error", "cost")
        entries = _entries(table, "steps", ("label",))
        for source, error, spent, row in zip(*(table[c].to_pylist() for c in columns), entries, strict=True):
            of = counts.setdefault(source, Counter({"positive": 0, "negative": 0, "null": 0, "solutions": 0, "failed": 0}))  # fmt: skip
            of["solutions"] += 1
            of["failed"] += bool(error)
            cost[source] += spent
            for entry in row:
                of[{1: "positive", 0: "negative", None: "null"}[entry["label"]]] += 1
    return {source: {**counts[source], "cost": round(cost[source], 6)} for source in sorted(counts)}


def _agreement(
    label_sets: Mapping[str, Mapping[str, Sequence[int | None]]], review_queue: pa.Table | None
) -> dict[str, Row]:
    """Each pair of sources, over the steps that both label: kappa, share of equal labels, of equal first errors.

    Where the expert is one of them, `kappa_weighted` weights the steps by 1 / inclusion probability of the queue.
    """
    inclusion: dict[tuple[str, int], float] = {}
    if review_queue is not None:
        names = ("solution_id", "step_index", "inclusion_probability")
        for solution, step, chance in zip(*(review_queue[name].to_pylist() for name in names), strict=True):
            inclusion[solution, step] = chance
    table = {}
    for first, second in combinations(sorted(label_sets, key=_source_order), 2):
        pairs: list[tuple[int, int, float]] = []
        same_first: list[bool] = []
        for solution in sorted(label_sets[first].keys() & label_sets[second].keys()):
            both = zip(label_sets[first][solution], label_sets[second][solution], strict=True)
            kept = [
                (a, b, 1 / inclusion.get((solution, step), 1.0))
                for step, (a, b) in enumerate(both)
                if a is not None and b is not None
            ]
            pairs += kept
            if kept:
                same_first.append(
                    metrics.first_error([k[0] for k in kept]) == metrics.first_error([k[1] for k in kept])
                )
        if not pairs:
            continue
        a, b, weights = (np.array(column) for column in zip(*pairs, strict=True))
        table[f"{first}_{second}"] = {
            "kappa": metrics.cohen_kappa(a, b),
            "kappa_weighted": metrics.cohen_kappa(a, b, weights) if inclusion and "expert" in (first, second) else None,
            "agreement": float((a == b).mean()),
            "first_error": sum(same_first) / len(same_first),
            "steps": len(pairs),
            "solutions": len(same_first),
        }
    return table


def _source_order(source: str) -> tuple[int, str]:
    known = ("judge", "monte_carlo", "tree_search", "expert", "phantom")
    return (known.index(source) if source in known else len(known), source)


# Counts


def _counts(
    config: EvaluateConfig,
    cases: Sequence[_Case],
    arms: Sequence[str],
    n: int,
    faulty: Sequence[str],
    tables: Mapping[str, pa.Table],
    labels: Sequence[pa.Table],
) -> Row:
    """What went in and what is missing; nothing leaves the figures without a number here."""
    scored = {arm: sum(int((~np.isnan(case.rewards[arm])).sum()) for case in cases) for arm in arms}
    total = sum(len(case.solution_ids) for case in cases)
    errors = {name: _errors(table) for name, table in tables.items()}
    for table in labels:
        for source in pc.unique(table["source"]).to_pylist():
            own = _errors(table.filter(pc.equal(table["source"], source)))
            errors[f"{source}_labels"] = dict(Counter(errors.get(f"{source}_labels", {})) + Counter(own))
    return {
        "split": config.split,
        "questions": len(cases),
        "excluded": dict(Counter(error_kind(e) for e in faulty)),
        "solutions": total,
        "without_answer": sum(int((case.codes < 0).sum()) for case in cases),
        "questions_without_solutions": sum(not case.solution_ids for case in cases),
        "questions_with_fewer_than_n": sum(len(case.solution_ids) < n for case in cases),
        "scored": scored,
        "unscored": {arm: total - scored[arm] for arm in arms},
        "questions_without_scores": {
            arm: sum(bool(np.isnan(case.rewards[arm]).all()) for case in cases) for arm in arms
        },
        "errors": errors,
    }


def _errors(table: pa.Table) -> dict[str, int]:
    return dict(Counter(error_kind(e) for e in table["error"].to_pylist() if e))


# Examples


def _examples(
    config: EvaluateConfig,
    cases: Sequence[_Case],
    arms: Sequence[str],
    solutions: pa.Table,
    images: pa.Table,
    scores: pa.Table,
    truth: Mapping[str, Sequence[int | None]],
) -> list[Row]:
    """Cases worth a look, with the solutions that the scorers chose and one that they should not have, step by step.

    In turn: the image rescued the answer, it did not help, both scorers were right; within a kind by hash of the id.
    """
    main = "multimodal" if "multimodal" in arms else next(iter(arms), None)
    if main is None:
        return []
    kinds: dict[str, list[_Case]] = {"rescued": [], "missed": [], "agreed": []}
    for case in sorted(cases, key=lambda c: digest(config.seed, "example", c.row["question_id"])):
        chosen, by_text = (metrics.best_of_n(case.rewards[a]) if a in arms else None for a in (main, "text_only"))
        if chosen is None:
            continue
        right = bool(case.correct[chosen])
        right_by_text = by_text is not None and bool(case.correct[by_text])
        kinds["missed" if not right else "agreed" if right_by_text else "rescued"].append(case)
    turns = [found[i] for i in range(len(cases)) for found in kinds.values() if i < len(found)]
    picked = turns[: config.num_examples]
    kind_of = {case.row["question_id"]: kind for kind, found in kinds.items() for case in found}
    parts = _parts(scores, {case.row["question_id"] for case in picked})
    texts = {row["question_id"]: row["solutions"] for row in _rows(solutions, [c.row["question_id"] for c in picked])}
    pictures = {row["image_id"]: row for row in images.select(["image_id", "uri", "diagnosis"]).to_pylist()}
    examples = []
    for case in picked:
        question = case.row["question_id"]
        shown = []
        for index, roles in _shown(case, main, arms).items():
            solution = texts[question][index]
            shown.append(_shown_solution(solution, roles, case.rewards[main][index], parts, main, truth))
        keep = ("question_id", "question", "options", "answer", "answer_type", "difficulty", "modality")
        examples.append(
            {
                "kind": kind_of[question],
                **{name: case.row[name] for name in keep},
                "images": [pictures[i] for i in case.row["image_ids"] if i in pictures],
                "share_right": float(case.correct.mean()),
                "solutions": shown,
            }
        )
    return examples


def _shown(case: _Case, main: str, arms: Sequence[str]) -> dict[int, list[str]]:
    """The indices of at most three solutions with their roles: each scorer's choice and the best of the other truth."""
    shown: dict[int, list[str]] = {}
    for arm in (main, "text_only"):
        chosen = metrics.best_of_n(case.rewards[arm]) if arm in arms else None
        if chosen is not None and f"chosen by {arm}" not in shown.get(chosen, []):
            shown.setdefault(chosen, []).append(f"chosen by {arm}")
    first = next(iter(shown))
    other = np.where(case.correct == case.correct[first], math.nan, case.rewards[main])
    contrast = metrics.best_of_n(other)
    if contrast is not None:
        word = "wrong" if case.correct[first] else "right"
        shown.setdefault(contrast, []).append(f"highest-scored {word} answer")
    return shown


def _shown_solution(
    solution: Row,
    roles: Sequence[str],
    reward: float,
    parts: Mapping[tuple[str, str], tuple[list[float], list[float]]],
    main: str,
    truth: Mapping[str, Sequence[int | None]],
) -> Row:
    ident = solution["solution_id"]
    text_part, image_part = parts[ident, main]
    labels = truth.get(ident, [None] * len(solution["steps"]))
    steps = [
        {
            "text": text,
            "probability": round(float(metrics.probability(a + b)), 6),
            "text_log_odds": round(a, 4),
            "image_log_odds": round(b, 4),
            "truth": label,
        }
        for text, a, b, label in zip(solution["steps"], text_part, image_part, labels, strict=True)
    ]
    return {
        "solution_id": ident,
        "roles": list(roles),
        "answer": solution["answer"],
        "correct": bool(solution["correct"]),
        "reward": round(float(metrics.probability(reward)), 6),
        "steps": steps,
    }


def _rows(table: pa.Table, ids: Sequence[str]) -> list[Row]:
    found: list[Row] = table.filter(pc.is_in(table["question_id"], pa.array(ids, pa.string()))).to_pylist()
    return found


def _parts(scores: pa.Table, ids: set[str]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    rows = _rows(scores, sorted(ids))
    return {
        (row["solution_id"], row["arm"]): (row["text_log_odds"], row["image_log_odds"])
        for row in rows
        if not row["error"]
    }


# What the run says of itself


def step_entries(manifests: Mapping[str, Manifest]) -> list[Row]:
    """One entry a table or artifact, in the order given, from the manifests."""
    return [
        {
            "name": name,
            "rows": manifest.rows,
            "seconds": manifest.seconds,
            "cost": manifest.cost,
            "errors": manifest.errors,
        }
        for name, manifest in manifests.items()
    ]


def environment() -> Row:
    """Machine, packages and code revision of this process."""
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count() or 0,
        "revision": code_revision(),
        "packages": package_versions(),
    }
