"""A reward function for TRL's trainers (GRPO, RLOO …):

    from medmm_ray.rewards.trl import step_reward
    trainer = GRPOTrainer(model=…, reward_funcs=step_reward("http://127.0.0.1:8000"), train_dataset=…)

TRL calls it with `prompts`, `completions` and each of the data set's other columns, a list each. Columns of the names
that a prompt of `/v1/rewards` has (question, options, documents, image, gold …) are sent; without `question` the
prompt's last message is the question, and of `images` the first is the image.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medmm_ray.rewards.batch import FIELDS, Sample, connect, rewards_of, text_of
from medmm_ray.service.rewards import RewardTerms

RewardFunction = Callable[..., list[float]]


def step_reward(
    url: str = "",
    key: str = "",
    *,
    terms: RewardTerms | None = None,
    columns: Mapping[str, str] | None = None,
) -> RewardFunction:
    """A function that TRL takes in `reward_funcs`; `columns` names a data set's columns: ``{"gold": "solution"}``."""
    client = connect(url, key)  # kept open: trainers call at every step
    names = {field: field for field in FIELDS} | dict(columns or {})

    def medmm_step_reward(prompts: Sequence[Any], completions: Sequence[Any], **data: Any) -> list[float]:
        """The reward of each completion; its name is the metric's in TRL's logs."""
        samples: list[Sample] = []
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            fields = {field: data[column][place] for field, column in names.items() if column in data}
            # A column says it without the chat template's words, which the reward model never saw.
            fields.setdefault("question", text_of(prompt))
            if fields.get("image") is None and data.get("images"):
                fields["image"] = (data["images"][place] or [None])[0]
            samples.append(Sample(fields, text_of(completion)))
        return [reward.reward for reward in rewards_of(client, samples, terms)]

    return medmm_step_reward
