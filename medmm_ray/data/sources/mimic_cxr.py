"""MIMIC-CXR-JPG: chest radiographs with the impression of their report as diagnosis (Johnson et al. 2019).

`path` is PhysioNet's folder: files/p10/p10000032/s50414267/<picture>.jpg, mimic-cxr-2.0.0-split.csv, and MIMIC-CXR's
reports as files/p10/p10000032/s50414267.txt. Patients are the groups: a split shares none with another.
"""

import json
import re
from functools import lru_cache

from pyarrow import fs as pafs

from medmm_ray.data.columns import text_at
from medmm_ray.data.rows import list_tables, read_rows
from medmm_ray.data.source_files import read_text
from medmm_ray.data.sources import SourceData, SourceImage, SourceRequest
from medmm_ray.data.tables import TableError, filesystem

_SPLITS = {"train": "train", "validate": "validation", "test": "test"}
_IMPRESSION = re.compile(r"IMPRESSION:\s*(.+?)(?=\n\s*[A-Z][A-Z ]+:|\Z)", re.DOTALL)


def read(request: SourceRequest) -> SourceData:
    """The pictures of the split file, those without an impression too; `num_train` and `num_test` count pictures."""
    folder = request.path.rstrip("/")
    limits = {"train": request.num_train, "test": request.num_test}
    num_read = dict.fromkeys(_SPLITS.values(), 0)
    images = []
    for number, row in enumerate(read_rows(_split_file(folder))):
        where = f"{folder} split row {number}"
        split = _SPLITS[text_at(row, "split", where)]
        limit = limits.get(split)
        if limit is not None and num_read[split] >= limit:
            continue
        num_read[split] += 1
        patient, study = text_at(row, "subject_id", where), text_at(row, "study_id", where)
        # PhysioNet's own layout: the first two digits, the patient, the study.
        below = f"{folder}/files/p{patient[:2]}/p{patient}"
        images.append(
            SourceImage(
                uri=f"{below}/s{study}/{text_at(row, 'dicom_id', where)}.jpg",
                split=split,
                modality="radiology",
                diagnosis=_impression(f"{below}/s{study}.txt"),
                annotation=json.dumps({"group": patient}),
            )
        )
    return SourceData(images=images)


def _split_file(folder: str) -> str:
    for uri in list_tables(folder):
        if "split.csv" in uri.rpartition("/")[2]:
            return uri
    raise TableError(f"{folder} has no mimic-cxr-2.0.0-split.csv: it names the pictures of each split")


@lru_cache(maxsize=4)
def _impression(uri: str) -> str:
    """A report's impression in one line; empty where there is no report, or none in it."""
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        return ""
    match = _IMPRESSION.search(read_text(uri))
    return " ".join(match[1].split()) if match else ""
