"""The published formats of process reward models: how a solution is written, and where and how its steps are read.

medprm               Med-PRM (arXiv 2506.11474): chat template, " ки" after each step, " +" against " -" there
math_shepherd        Math-Shepherd (arXiv 2312.08935): plain text, "ки" after each step, "+" against "-" there
qwen_prm             Qwen2.5-Math-PRM (arXiv 2501.07301): "<extra_0>" after each step of the assistant's turn, an MLP
token_classification TRL's: two classes at the last token of each step
meds3                MedS3 (arXiv 2501.12051): the same behind a chat template, from "Step 0" on; adapters on a base
medprm_vision        Med-PRM's format read by a vision-language model: LLaVA, InternVL
visualprm            VisualPRM (arXiv 2503.10291): a step a turn, "+" against "-" before each answer; InternVL

A family gives full sequences of ids with the places at which the steps are read, and log-odds of the states there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from medmm_ray.reward_model.families.family import Family, FamilyName, ImageTokens
from medmm_ray.reward_model.families.math_shepherd import MathShepherd
from medmm_ray.reward_model.families.medprm import MedPrm, MedPrmVision
from medmm_ray.reward_model.families.qwen_prm import QwenPrm, QwenProcessRewardModel
from medmm_ray.reward_model.families.token_classification import MedS3, TokenClassification
from medmm_ray.reward_model.families.visualprm import VisualPrm

__all__ = [
    "NAMES",
    "VISION_LANGUAGE",
    "WITH_SYSTEM_PROMPT",
    "Family",
    "FamilyName",
    "ImageTokens",
    "MedPrm",
    "QwenProcessRewardModel",
    "about",
    "detect",
    "make",
]

NAMES: tuple[FamilyName, ...] = get_args(FamilyName)
VISION_LANGUAGE: tuple[FamilyName, ...] = ("medprm_vision", "visualprm")
"""Those whose language model reads the images itself."""
WITH_SYSTEM_PROMPT: tuple[FamilyName, ...] = ("medprm", "medprm_vision", "qwen_prm")
"""Those whose format has a system message, which may be another than their own."""

CLASSES: Mapping[FamilyName, type[Family]] = {
    "medprm": MedPrm,
    "medprm_vision": MedPrmVision,
    "math_shepherd": MathShepherd,
    "qwen_prm": QwenPrm,
    "token_classification": TokenClassification,
    "meds3": MedS3,
    "visualprm": VisualPrm,
}


def about(name: FamilyName) -> str:
    """One sentence on a family."""
    return str(CLASSES[name].__doc__).splitlines()[0]


def make(name: FamilyName, tokenizer: Any, image_tokens: ImageTokens | None = None) -> Family:
    """The family of that name; raises `ValueError` where the tokenizer does not fit it.

    `image_tokens`: how a vision-language model's images stand in the text.
    """
    match name:
        case "medprm":
            return MedPrm(tokenizer)
        case "math_shepherd":
            return MathShepherd(tokenizer)
        case "qwen_prm":
            return QwenPrm(tokenizer)
        case "token_classification":
            return TokenClassification(tokenizer)
        case "meds3":
            return MedS3(tokenizer)
    assert image_tokens is not None
    return MedPrmVision(tokenizer, image_tokens) if name == "medprm_vision" else VisualPrm(tokenizer, image_tokens)


def detect(architectures: Sequence[str], tokenizer: Any) -> FamilyName | None:
    """The family of a checkpoint by its config's `architectures` and its tokenizer; None where it fits none."""
    names = " ".join(architectures)
    if "ProcessRewardModel" in names:
        return "qwen_prm"
    if "ForTokenClassification" in names:
        return "token_classification"
    if "InternVLForConditionalGeneration" in names:
        return "visualprm"
    if "LlavaForConditionalGeneration" in names:
        return "medprm_vision"
    if "ForCausalLM" not in names:
        return None
    if tokenizer.chat_template:
        return "medprm"
    return "math_shepherd" if _is_one(tokenizer, "ки") else None


def _is_one(tokenizer: Any, text: str) -> bool:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1
