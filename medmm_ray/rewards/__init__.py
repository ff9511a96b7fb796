"""The scorer as the reward function of a trainer: one module each for TRL, verl and OpenRLHF.

Each sends a batch to `POST /v1/rewards` and gives the trainer its numbers in the shape that it expects. The reward is
the service's (`medmm_ray.service.rewards`): PURE's min-form of the steps' probabilities, the answer check, the length.
Where the service is, and the key, are arguments, or the environment's ``MEDMM_URL`` and ``MEDMM_TOKEN``.
"""
