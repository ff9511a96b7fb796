"""A reward function for OpenRLHF: ``--reward.remote_url <site-packages>/medmm_ray/rewards/openrlhf.py``.

Or, without a key, the service's own address, ``--reward.remote_url http://127.0.0.1:8000/v1/rewards``: it reads
OpenRLHF's body. A label is the right answer, or an object as JSON text with fields of a prompt of `/v1/rewards`
(question, options, documents, image, gold), for the prompt that OpenRLHF sends is the chat template's text.
"""

from collections.abc import Sequence
from typing import Any

from medmm_ray.rewards.batch import connect
from medmm_ray.service.openrlhf import OpenRlhfRequest


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **_: Any) -> dict[str, Any]:
    """Rewards for the advantage, scores in [0, 1] for the filter, figures to log: tensors [samples]."""
    import torch  # the trainer has it; importing this package needs none

    request = OpenRlhfRequest(query=list(queries), prompts=list(prompts), labels=list(labels))
    with connect() as client:
        answer = client.openrlhf_rewards(request)
    logs = {name: torch.tensor(values) for name, values in answer.extra_logs.items()}
    return {"rewards": torch.tensor(answer.rewards), "scores": torch.tensor(answer.scores), "extra_logs": logs}
