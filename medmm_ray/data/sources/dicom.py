"""A folder of DICOM files, as a PACS or a scanner writes them: pictures without questions.

`path` is the folder; every file below it that is DICOM counts, whatever its name. A picture's split is the name of the
folder below `path` where that is one (train, validation, test), else training. No tag that names a person, a place or a
day leaves the reader: an annotation has the kind of picture, the part of the body, the view and side, a hash that
pictures of one patient share, and whether text may be burnt into the pixels.
"""

import json

from pyarrow import fs as pafs

from medmm_ray.config import ConfigError
from medmm_ray.data import dicom
from medmm_ray.data.sources import SourceData, SourceImage, SourceRequest
from medmm_ray.data.sources.table import SPLITS, draw
from medmm_ray.data.tables import RowError, filesystem

_OF_MODALITY = {"SM": "pathology", "GM": "pathology", "XC": "clinical", "ES": "clinical", "OP": "clinical"}
"""What DICOM's kinds of pictures are here; all others are radiology."""


def read(request: SourceRequest) -> SourceData:
    """The frames of all files; a file that is no picture is an image with an error, found when it is opened."""
    images = []
    for uri in _files(request.path):
        try:
            facts = dict(dicom.facts(uri))
        except RowError as fault:
            if fault.kind == "dicom_format":
                continue
            facts = {}
        below = uri.removeprefix(request.path.rstrip("/")).strip("/").partition("/")[0]
        for name, place in dicom.frames(uri, request.path):
            images.append(
                SourceImage(
                    uri=name,
                    split=below if below in SPLITS else "train",
                    modality=_OF_MODALITY.get(facts.get("Modality", ""), "radiology"),
                    annotation=json.dumps({**json.loads(place), **facts}),
                    drawn=True,
                )
            )
    if not images:
        raise ConfigError(f"{request.path} has no DICOM file; name the folder that holds them as `path` of its source")
    return SourceData(images=images, draw=draw)


def _files(path: str) -> list[str]:
    fs, plain_path = filesystem(path)
    info = fs.get_file_info(plain_path)
    if info.type == pafs.FileType.NotFound:
        raise ConfigError(f"{path} does not exist; name the folder of DICOM files as `path` of its source")
    if info.is_file:
        return [path]
    names = []
    for below in fs.get_file_info(pafs.FileSelector(plain_path, recursive=True)):
        if below.is_file:
            names.append(below.path.removeprefix(plain_path).lstrip("/"))
    return [f"{path.rstrip('/')}/{name}" for name in sorted(names)]
