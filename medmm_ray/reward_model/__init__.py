"""The process reward model: exact shared-prefix scoring, and an image part that is added to the text's log-odds."""

from medmm_ray.reward_model.checkpoint import TrainedInputs
from medmm_ray.reward_model.errors import CheckpointError, ImageError
from medmm_ray.reward_model.fusion import Fusion, FusionConfig, ImageFeatures
from medmm_ray.reward_model.model import RewardModel
from medmm_ray.reward_model.packing import (
    Branch,
    PackedQuestion,
    Packing,
    choose_documents,
    pack,
)
from medmm_ray.reward_model.request import ScoreRequest
from medmm_ray.reward_model.scores import SolutionStates, StepAttention, StepScores
from medmm_ray.reward_model.text_head import TextHead

__all__ = [
    "Branch",
    "CheckpointError",
    "Fusion",
    "FusionConfig",
    "ImageError",
    "ImageFeatures",
    "PackedQuestion",
    "Packing",
    "RewardModel",
    "ScoreRequest",
    "SolutionStates",
    "StepAttention",
    "StepScores",
    "TextHead",
    "TrainedInputs",
    "choose_documents",
    "pack",
]
