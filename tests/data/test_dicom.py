"""DICOM as it comes: pydicom's own odd files, and files whose every value is known."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medmm_ray.data import dicom
from medmm_ray.data.sources import SourceRequest
from medmm_ray.data.sources import dicom as dicom_source
from medmm_ray.data.tables import RowError
from medmm_ray.steps.ingest import ReadSource, SourceConfig, drawings_of, image_table, inspect_batch

GREY = np.array([[0, 1000, 2000], [3000, 4000, 4095]], np.uint16)


def write(path: Path, values: NDArray[Any], **tags: Any) -> str:
    """A file of the secondary capture class with these pixels."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    frames = values if values.ndim == 3 else values[None]
    if len(frames) > 1:
        dataset.NumberOfFrames = len(frames)
    dataset.Rows, dataset.Columns = frames.shape[1:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = values.dtype.itemsize * 8
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, 0
    dataset.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return str(path)


def pixels(uri: str, frame: int = 0) -> list[list[int]]:
    rows: list[list[int]] = np.asarray(dicom.picture(uri, frame)).tolist()
    return rows


def test_a_window_of_the_tags_is_the_picture(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.dcm", GREY, WindowCenter=2000.5, WindowWidth=2001)
    assert pixels(uri) == [[0, 0, 128], [255, 255, 255]] or pixels(uri) == [[0, 0, 127], [255, 255, 255]]


def test_without_a_window_the_middle_of_the_values_is_the_picture(tmp_path: Path) -> None:
    ramp = np.arange(10000, dtype=np.uint16).reshape(100, 100)
    ramp[0, 0] = 65535  # a hot pixel
    picture = np.asarray(dicom.picture(write(tmp_path / "a.dcm", ramp)))
    assert (picture.min(), picture.max()) == (0, 255)
    assert 126 <= picture[50, 0] <= 129


def test_monochrome1_is_inverted_and_slopes_are_applied(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.dcm", GREY, WindowCenter=2048, WindowWidth=4096)
    inverted = write(
        tmp_path / "b.dcm", GREY, WindowCenter=2048, WindowWidth=4096, PhotometricInterpretation="MONOCHROME1"
    )
    slope = {"RescaleSlope": 2, "RescaleIntercept": -10, "WindowCenter": 4086, "WindowWidth": 8192}
    scaled = write(tmp_path / "c.dcm", GREY, **slope)
    assert (255 - np.asarray(dicom.picture(inverted))).tolist() == pixels(plain)
    assert np.abs(np.asarray(dicom.picture(scaled)).astype(int) - np.asarray(dicom.picture(plain))).max() <= 1


def test_frames_are_pictures_of_their_own(tmp_path: Path) -> None:
    frames = np.stack([GREY, GREY[::-1]])
    uri = write(tmp_path / "cine.dcm", frames, WindowCenter=2048, WindowWidth=4096)
    assert dicom.num_frames(uri) == 2
    assert pixels(uri, 1) == pixels(uri, 0)[::-1]
    names = [name for name, _ in dicom.frames(uri, str(tmp_path))]
    assert names == ["cine.dcm-0.png", "cine.dcm-1.png"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, [[0, 1], [2, 3]]),
        ({"PatientOrientation": ["L", "F"]}, [[0, 1], [2, 3]]),
        ({"PatientOrientation": ["R", "F"]}, [[1, 0], [3, 2]]),
        ({"PatientOrientation": ["L", "H"]}, [[2, 3], [0, 1]]),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, [[0, 1], [2, 3]]),  # axial
        ({"ImageOrientationPatient": [-1, 0, 0, 0, -1, 0]}, [[3, 2], [1, 0]]),  # axial, prone
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, [[0, 1], [2, 3]]),  # coronal
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, 1]}, [[2, 3], [0, 1]]),  # coronal, head down
        ({"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, [[0, 2], [1, 3]]),  # axial, rows and columns changed
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, [[0, 1], [2, 3]]),  # sagittal
    ],
)
def test_pictures_hang_as_in_a_viewer(tags: dict[str, Any], expected: list[list[int]], tmp_path: Path) -> None:
    values = np.array([[0, 1], [2, 3]], np.uint8)
    uri = write(tmp_path / "a.dcm", values, WindowCenter=2, WindowWidth=4, **tags)
    picture = np.asarray(dicom.picture(uri))
    order = {level: rank for rank, level in enumerate(sorted(set(picture.ravel().tolist())))}
    assert [[order[level] for level in row] for row in picture.tolist()] == expected


def test_nothing_that_names_a_person_leaves_the_reader(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    names = {
        "PatientName": "Doe^Jane", "PatientID": "MRN-4711", "PatientBirthDate": "19500102", "StudyDate": "20200304",
        "InstitutionName": "Mercy", "AccessionNumber": "A77", "ReferringPhysicianName": "Who^Dr",
    }  # fmt: skip
    tags = {"Modality": "US", "BodyPartExamined": "ABDOMEN", "BurnedInAnnotation": "YES"}
    write(tmp_path / "test" / "a.dcm", GREY, **names, **tags)
    write(tmp_path / "b", GREY, PatientID="MRN-4711")
    (tmp_path / "notes.txt").write_text("no picture")
    data = dicom_source.read(SourceRequest(path=str(tmp_path)))
    other, image = data.images
    assert (image.split, other.split, image.modality) == ("test", "train", "radiology")
    annotation = json.loads(image.annotation)
    assert (annotation["BodyPartExamined"], annotation["burnt_in"]) == ("ABDOMEN", "yes")
    assert annotation["group"] == json.loads(other.annotation)["group"]
    for value in names.values():
        assert value not in image.annotation
    source = ReadSource(SourceConfig(name="ours", reader="dicom", path=str(tmp_path)), data)
    rows = inspect_batch(image_table([source], f"{tmp_path}/made"), drawings_of([source])).to_pylist()
    assert [(row["width"], row["height"], row["error"]) for row in rows] == [(3, 2, None)] * 2
    for row in rows:
        assert not any(value.encode() in Path(row["uri"]).read_bytes() for value in names.values())


def test_pydicoms_own_odd_files_are_read_or_named() -> None:
    """Compressed in every way, multi-frame, without preamble, big endian, truncated, and no pictures at all."""
    import pydicom.data

    files = sorted((Path(pydicom.data.__file__).parent / "test_files").glob("*.dcm"))
    outcomes: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in files:
            try:
                picture = dicom.picture(str(file), dicom.num_frames(str(file)) - 1)
                outcomes[picture.mode] += 1
            except RowError as fault:
                outcomes[fault.kind] += 1
    assert set(outcomes) == {"L", "RGB", "dicom_format", "dicom_pixels", "dicom_syntax"}
    assert outcomes["L"] + outcomes["RGB"] >= 50
    assert outcomes["dicom_syntax"] <= 4
    assert outcomes.total() == len(files) >= 60


@pytest.mark.parametrize(
    ("content", "kind"), [(b"", "image_empty"), (b"no DICOM", "dicom_format"), (None, "image_missing")]
)
def test_what_is_no_dicom_is_named(content: bytes | None, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RowError) as fault:
        dicom.picture(str(path))
    assert fault.value.kind == kind
