"""Reward functions for verl, named in its configuration:

    reward:
      custom_reward_function:
        path: <site-packages>/medmm_ray/rewards/verl.py
        name: compute_score                                # or compute_scores for the batch manager
        reward_kwargs: {url: http://127.0.0.1:8000}

(earlier versions have `custom_reward_function` at the top). verl calls the one for each sample, the other for a batch.
`extra_info` of a row has the prompt's fields by the names of `/v1/rewards`: question at least, options, documents,
image; `ground_truth` is the right answer, empty: not known.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from medmm_ray.client import Client
from medmm_ray.rewards.batch import FIELDS, Sample, connect, rewards_of
from medmm_ray.service.rewards import Reward


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str = "",
    key: str = "",
    **_: Any,
) -> dict[str, float]:
    """The reward of one sample: `score`, and its parts, which verl logs."""
    (scores,) = compute_scores([data_source], [solution_str], [ground_truth], [extra_info], url=url, key=key)
    return scores


def compute_scores(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[str | None],
    extra_infos: Sequence[Mapping[str, Any] | None],
    *,
    url: str = "",
    key: str = "",
    **_: Any,
) -> list[dict[str, float]]:
    """The same for a batch. Raises ValueError where a row does not say its question."""
    samples: list[Sample] = []
    for source, solution, gold, info in zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True):
        fields = {name: info[name] for name in FIELDS if name in info} if info else {}
        if "question" not in fields:
            raise ValueError(f"a row of {source} has no question; put it into extra_info['question']")
        # verl has an empty text where there is no right answer.
        samples.append(Sample({**fields, "gold": gold or None}, solution))
    return [_parts(reward) for reward in rewards_of(_client(url, key), samples)]


def _parts(reward: Reward) -> dict[str, float]:
    # Every row has the same names: verl stacks them.
    return {
        "score": reward.reward,
        "process": reward.process,
        "answer": reward.answer or 0.0,
        "length": reward.length,
    }


@lru_cache
def _client(url: str, key: str) -> Client:
    """One client a process: verl calls from many threads."""
    return connect(url, key)
