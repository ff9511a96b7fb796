"""A `CurationReport` -> curation_report.html: the gates, pictures that became one side by side, the set's composition.

Enters: the report, and a function that opens an image's URI. Leaves: HTML with inline styles and pictures; it loads
nothing.
"""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from medmm_ray.pages.dataset_page import bar
from medmm_ray.pages.report import pages, picture
from medmm_ray.steps.curate.report import CurationReport

if TYPE_CHECKING:
    from PIL.Image import Image

GATES = {
    "readable": "Without an error of reading",
    "diagnostic": "Asks for a diagnosis, not for what kind of picture it is",
    "phi": "Without identifiers of a person",
    "once": "Each once, with pictures that are one merged",
    "near_texts": "No near text of another",
    "benchmarks": "Not in a benchmark's test set",
    "leaks": "No picture, patient or study of the test split in training",
    "quotas": "Within the quotas",
    "limits": "Within max_train and max_test",
}
KINDS = {
    "near_duplicate": "The same picture in other bytes",
    "altered": "The same picture, cropped, bordered, turned or inverted",
}
PHI = {
    "name": "name",
    "date": "date to the day",
    "phone": "phone number",
    "email": "e-mail address",
    "record_number": "record number",
    "ssn": "social security number",
    "address": "address",
    "age_over_89": "age above 89",
}


def render(report: CurationReport, open_image: "Callable[[str], Image]") -> str:
    """The page. `open_image` takes a URI and gives a picture; one that cannot be opened leaves its place empty."""
    uris: dict[str, None] = {}
    for pair in report.pairs:
        uris |= {pair.kept_uri: None, pair.removed_uri: None}
    by_kind: Counter[str] = Counter()
    for flagged in report.phi:
        by_kind.update(flagged.kinds)
    return (
        pages()
        .get_template("curation_page.html.j2")
        .render(
            r=report,
            lead=lead(report),
            gate_names=GATES,
            kind_names=KINDS,
            phi_names=PHI,
            phi_counts=by_kind,
            pictures={uri: picture(uri, open_image) for uri in uris},
            bar=bar,
        )
    )


def lead(report: CurationReport) -> str:
    """What stayed of what was read, in a sentence or two."""
    num_read, num_kept = report.gates[0].before, report.gates[-1].after
    sentences = [
        f"Of {num_read:,} questions {num_kept:,} stay; of {report.images_read:,} files of pictures "
        f"{report.images_kept:,} different ones."
    ]
    open_quotas = [quota for quota in report.quotas if quota.filled < quota.count]
    if open_quotas:
        sentences.append(f"Quotas that are not filled: {len(open_quotas)} of {len(report.quotas)}.")
    elif report.quotas:
        sentences.append("All quotas are filled.")
    num_identified = sum(flagged.is_kept for flagged in report.phi)
    if num_identified:
        what = "question that stays" if num_identified == 1 else "questions that stay"
        sentences.append(f"{num_identified:,} {what} may have identifiers of a person.")
    return " ".join(sentences)
