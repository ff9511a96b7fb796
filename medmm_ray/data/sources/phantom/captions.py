"""What a phantom's picture shows, in words: for contrastive training of the image tower (training cases only)."""

from medmm_ray.data.sources.phantom.case import Finding, PhantomCase
from medmm_ray.data.sources.phantom.truth import truth

NORMAL = (
    "Normal chest radiograph.",
    "Both lungs are clear and the heart size is normal.",
    "Normal chest, both costophrenic angles are sharp.",
    "No abnormality is seen in the chest.",
)


def captions(case: PhantomCase) -> tuple[str, ...]:
    """Ways to say what the picture shows; of several findings each is said, in sentences that hold for the case."""
    if not case.findings:
        return NORMAL
    true_sentences = []
    for finding in case.findings:
        true_sentences.append([sentence for sentence in _sentences(finding) if truth(sentence, case)])
    return tuple(map(" ".join, zip(*true_sentences, strict=False)))


def _sentences(finding: Finding) -> tuple[str, ...]:
    side, place = finding.side, f"{finding.side} {finding.zone} zone"
    match finding.kind:
        case "effusion":
            return (
                f"Chest radiograph with a {side} pleural effusion.",
                f"The {side} costophrenic angle is blunted by a {side} pleural effusion.",
                f"{side.capitalize()} pleural effusion, fluid in the {place}.",
                f"Fluid with a meniscus at the {side} lung base. The heart size is normal.",
            )
        case "pneumothorax":
            return (
                f"Chest radiograph with a {side} pneumothorax.",
                f"A lung edge at the {side} apex, a {side} pneumothorax.",
                f"{side.capitalize()} pneumothorax, no lung markings in the {place}.",
                f"Air around the {side} lung with a pleural edge. The heart size is normal.",
            )
        case "consolidation":
            return (
                f"Chest radiograph with a {side} consolidation.",
                f"A patchy opacity in the {place}, a {side} consolidation.",
                f"{side.capitalize()} consolidation in the {place}.",
                f"Airspace opacity in the {place}. The heart size is normal.",
            )
        case "nodule":
            return (
                f"Chest radiograph with a {side} lung nodule.",
                f"A round opacity in the {place}, a {side} lung nodule.",
                f"{side.capitalize()} lung nodule in the {place}.",
                f"A round spot in the {place}. The heart size is normal.",
            )
    return (
        "Chest radiograph with cardiomegaly.",
        "The heart is enlarged and both lungs are clear.",
        "Cardiomegaly, the cardiothoracic ratio is above half.",
        "Wide cardiac silhouette, cardiomegaly.",
    )
