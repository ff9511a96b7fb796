"""Pictures of DICOM files: 8-bit, as a viewer shows them first; no tag that names a person leaves this module.

Enters: the URI of a file. Leaves: its frames, each a picture: window from the tags, else the middle 98 % of the values;
MONOCHROME1 inverted; colours as RGB. A file that is none, or has no pixels, is a `RowError`; its kinds: dicom_format
(no DICOM), dicom_pixels (no picture in it), dicom_syntax (compressed in a way for which no decoder is installed).
"""

import functools
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from medmm_ray.config import digest
from medmm_ray.data.tables import RowError, filesystem

ENDINGS = (".dcm", ".dicom", ".ima")
LOW, HIGH = 1.0, 99.0
"""Percentiles of the values that become black and white where a file has no window."""
FACTS = ("Modality", "BodyPartExamined", "ViewPosition", "Laterality", "ImageLaterality")
"""Tags that may leave: what was taken, of which part, from which side. None names a person, a place or a day."""
GROUPS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
"""Tags that say what files share, the first that there is; it leaves as a hash."""


def frames(uri: str, path: str) -> list[tuple[str, str]]:
    """For each frame of a file its picture's name below the job's folder, and the annotation that `picture` is made of.

    A file that cannot be read has one, whose picture then is the row's error.
    """
    name = uri.removeprefix(path.rstrip("/")).strip("/").replace("/", "-")
    try:
        number = num_frames(uri)
    except RowError:
        number = 1
    places = []
    for frame in range(number):
        places.append((f"{name}-{frame}.png", json.dumps({"dicom": uri, "frame": frame})))
    return places


def num_frames(uri: str) -> int:
    """How many pictures a file has."""
    number = _tag(_header(uri), "NumberOfFrames", 1)
    return max(1, int(number)) if str(number).isdigit() else 1


def facts(uri: str) -> Mapping[str, str]:
    """What a file says of its picture that names nobody: `FACTS`, "group" (a hash), and "burnt_in" ("yes", "no", "").

    "burnt_in" is what the file says of text in its pixels; ultrasound and captured screens usually have some.
    """
    header = _header(uri)
    values = {name: str(_tag(header, name, "") or "") for name in FACTS}
    for name in GROUPS:
        # A hash joins the pictures of a patient, and tells nobody who it is.
        if _tag(header, name, ""):
            values["group"] = digest("dicom", name, str(_tag(header, name, "")))
            break
    burnt_in = str(_tag(header, "BurnedInAnnotation", "") or "").lower()
    # Machines write their names and measures into these, whatever the tag says.
    is_suspect = values["Modality"] in ("US", "SC", "OT", "XC") or "ConversionType" in header
    values["burnt_in"] = burnt_in or ("maybe" if is_suspect else "")
    return values


def _tag(
    header: Any,
    name: str,
    default: Any,
) -> Any:
    """A tag's value; files break every rule that a tag has, and a broken one counts as missing."""
    try:
        return header.get(name, default)
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError, OverflowError, LookupError):
        return default


@functools.lru_cache(maxsize=64)
def _header(uri: str) -> Any:
    return _read(uri, stop_before_pixels=True)


def _read(uri: str, stop_before_pixels: bool = False) -> Any:
    import pydicom
    from pydicom.errors import InvalidDicomError

    fs, path = filesystem(uri)
    try:
        with fs.open_input_stream(path, compression=None) as stream:
            content: bytes = stream.read()
    except OSError as error:
        raise RowError("image_missing", f"{uri} cannot be read: {error}") from None
    # An empty file is no DICOM of old.
    if not content:
        raise RowError("image_empty", f"{uri} has 0 bytes")
    try:
        return pydicom.dcmread(io.BytesIO(content), stop_before_pixels=stop_before_pixels, force=False)
    except InvalidDicomError:
        pass
    # Old files have no preamble; what then holds no tag is no DICOM.
    try:
        header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=stop_before_pixels, force=True)
    except Exception as error:  # noqa: BLE001 - pydicom raises what its parsers do
        raise RowError("dicom_format", f"{uri} is no DICOM file: {type(error).__name__}") from None
    if "SOPClassUID" not in header and "Rows" not in header:
        raise RowError("dicom_format", f"{uri} is no DICOM file")
    return header


def picture(uri: str, frame: int = 0) -> PIL.Image.Image:
    """A frame as an 8-bit picture, grey or RGB; raises `RowError` where there is none."""
    return PIL.Image.fromarray(_eight_bits(_read_whole(uri), uri, frame))


@functools.lru_cache(maxsize=1)
def _read_whole(uri: str) -> Any:
    return _read(uri)


def _eight_bits(
    dataset: Any,
    uri: str,
    frame: int,
) -> NDArray[np.uint8]:
    from pydicom.pixels.utils import pixel_array

    if "PixelData" not in dataset and "FloatPixelData" not in dataset and "DoubleFloatPixelData" not in dataset:
        raise RowError("dicom_pixels", f"{uri} has no pixels ({_tag(dataset, 'Modality', '')})")
    try:
        dataset.file_meta.TransferSyntaxUID  # noqa: B018 - asked for before the decoder, which fails less clearly
    except AttributeError:
        _assume_syntax(dataset)
    try:
        values = pixel_array(dataset, index=frame)
    except (RuntimeError, NotImplementedError) as error:
        raise RowError("dicom_syntax", f"{uri} cannot be decoded: {_one_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - a broken file fails in any way
        raise RowError("dicom_pixels", f"{uri} has broken pixels: {_one_line(error)}") from None
    # Colours have no window.
    if values.ndim == 3 and values.shape[-1] in (3, 4):
        return _turned(dataset, _scaled_colours(values[..., :3]))
    if values.ndim != 2:
        raise RowError("dicom_pixels", f"{uri} has pixels of shape {values.shape}, which is no picture")
    return _turned(dataset, _grey(dataset, values))


def _assume_syntax(dataset: Any) -> None:
    """Old files state no transfer syntax: theirs is the first that there was."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    # The bytes tell which of the two it was.
    is_implicit = dataset.original_encoding[0] is not False
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian


def _one_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def _scaled_colours(values: NDArray[Any]) -> NDArray[np.uint8]:
    # Eight bits are a picture as they are.
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    return _stretched(values.astype(np.float64), float(values.min()), float(values.max()))


def _grey(dataset: Any, values: NDArray[Any]) -> NDArray[np.uint8]:
    """The values of one channel through modality and window, or their percentiles, as 0 to 255."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

    photometric = str(_tag(dataset, "PhotometricInterpretation", ""))
    # Values are numbers of colours.
    if photometric == "PALETTE COLOR":
        return _scaled_colours(apply_color_lut(values, dataset)[..., :3])
    scaled = values.astype(np.float64)
    # Tables that are broken are left out: the picture without them is a picture still.
    try:
        scaled = apply_modality_lut(values, dataset).astype(np.float64)
        has_window = "WindowCenter" in dataset or "VOILUTSequence" in dataset
        windowed = apply_voi_lut(apply_modality_lut(values, dataset), dataset) if has_window else None
    except Exception:  # noqa: BLE001 - as above
        windowed = None
    grey = None
    if windowed is not None:
        low, high = float(np.min(windowed)), float(np.max(windowed))
        # A window beside all values would be one grey.
        if high > low:
            grey = _stretched(windowed.astype(np.float64), low, high)
    if grey is None:
        # Float pixels may hold what is no number.
        finite = scaled[np.isfinite(scaled)]
        low, high = np.percentile(finite, [LOW, HIGH]) if finite.size else (0.0, 0.0)
        # Of a mask almost all values are equal.
        if high <= low and finite.size:
            low, high = float(finite.min()), float(finite.max())
        grey = _stretched(np.nan_to_num(scaled), float(low), float(high))
    return 255 - grey if photometric == "MONOCHROME1" else grey


def _turned(dataset: Any, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture as it is hung: the patient's left at the right, or the front at the left, the head at the top.

    Of slices ImageOrientationPatient says how they lie (x to the left, y to the back, z to the head), of radiographs
    PatientOrientation; a picture without either stays as it is.
    """
    cosines = _tag(dataset, "ImageOrientationPatient", None)
    letters = _tag(dataset, "PatientOrientation", None)
    if cosines is not None and len(cosines) == 6:
        row, column = np.array(cosines[:3], float), np.array(cosines[3:], float)
        row_axis, column_axis = int(np.argmax(np.abs(row))), int(np.argmax(np.abs(column)))
        # Axes are ordered as they are hung: x before y across, z always down.
        if row_axis > column_axis:
            values = np.swapaxes(values, 0, 1)
            row, column, row_axis, column_axis = column, row, column_axis, row_axis
        flips_rows = row[row_axis] < 0
        flips_columns = column[column_axis] > 0 if column_axis == 2 else column[column_axis] < 0
    elif letters is not None and len(letters) == 2:
        flips_rows, flips_columns = str(letters[0])[:1] == "R", str(letters[1])[:1] == "H"
    else:
        return values
    if flips_rows:
        values = values[:, ::-1]
    return np.ascontiguousarray(values[::-1] if flips_columns else values)


def _stretched(
    values: NDArray[np.float64],
    low: float,
    high: float,
) -> NDArray[np.uint8]:
    """Values from `low` to `high` as 0 to 255, those beyond cut."""
    # One value alone is black.
    width = high - low or 1.0
    return (np.clip((values - low) / width, 0, 1) * 255 + 0.5).astype(np.uint8)
