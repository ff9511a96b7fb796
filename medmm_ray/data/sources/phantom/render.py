"""Draws a case: a posteroanterior chest radiograph in a few dozen numpy operations (about 2 ms at 64 pixels).

Coordinates: x and y run from -1 to 1 over the picture, y downwards. Anatomy is drawn in the patient's own frame (after
undoing the pose), each shape as a soft mask in [0, 1] whose edge is about one pixel wide, so that any size looks alike.
Brightness is density: 0 air, 1 bone and fluid. The patient's right is at negative x.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from medmm_ray.data.sources.phantom.case import Finding, PhantomCase, generator

Field = NDArray[np.floating[Any]]

GLYPH_R = np.array(
    [[1, 1, 1, 1, 0], [1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0],
     [1, 0, 0, 0, 1]], dtype=np.float32)  # fmt: skip


class Anatomy(NamedTuple):
    """What varies between people and exposures; lengths in units of half the picture."""

    shift_x: float
    shift_y: float
    angle: float
    scale: float
    lung_width: float
    diaphragm: float
    heart_width: float
    rib_phase: float
    vessel_phase: float
    gain: float
    gamma: float
    noise: float


def render(case: PhantomCase, size: int = 64) -> PIL.Image.Image:
    """The case as a greyscale picture of `size` x `size` pixels; equal cases give equal pixels."""
    rng = generator("phantom", case.seed)
    anatomy = _anatomy(rng)
    soft = 1.6 / size
    grid_x, grid_y = _grid(size)
    # From the picture's frame into the patient's: shifted, turned and scaled back.
    cos = np.cos(anatomy.angle)
    sin = np.sin(anatomy.angle)
    u = grid_x - anatomy.shift_x
    v = grid_y - anatomy.shift_y
    x = ((cos * u + sin * v) / anatomy.scale).astype(np.float32)
    y = ((cos * v - sin * u) / anatomy.scale).astype(np.float32)

    picture = _chest(case, anatomy, rng, x, y, soft)
    picture = anatomy.gain * np.clip(picture, 0.0, 1.2) ** anatomy.gamma
    picture += case.noise * anatomy.noise * _grain(rng, size)
    # The marker is put on the film: it neither turns nor moves with the patient.
    picture = np.maximum(picture, 0.95 * _marker(grid_x, grid_y))
    levels = np.clip(picture, 0.0, 1.0) * 255.0 + 0.5
    return PIL.Image.fromarray(levels.astype(np.uint8))


def _anatomy(rng: np.random.Generator) -> Anatomy:
    return Anatomy(
        shift_x=rng.uniform(-0.04, 0.04),
        shift_y=rng.uniform(-0.04, 0.04),
        angle=rng.uniform(-0.06, 0.06),
        scale=rng.uniform(0.94, 1.05),
        lung_width=rng.uniform(0.95, 1.06),
        diaphragm=rng.uniform(0.42, 0.54),
        heart_width=rng.uniform(0.285, 0.325),
        rib_phase=rng.uniform(0.0, 2 * np.pi),
        vessel_phase=rng.uniform(0.0, 2 * np.pi),
        gain=rng.uniform(0.88, 1.06),
        gamma=rng.uniform(0.88, 1.15),
        noise=rng.uniform(0.008, 0.022),
    )


def _chest(
    case: PhantomCase,
    anatomy: Anatomy,
    rng: np.random.Generator,
    x: Field,
    y: Field,
    soft: float,
) -> Field:
    ax = np.abs(x)
    # The outline: flanks that draw in a little at the armpits, under sloping shoulders.
    armpits = np.exp(-(((y + 0.25) / 0.3) ** 2))
    flanks = ax / (0.93 - 0.10 * armpits)
    shoulders = -y - 0.10 + 0.75 * ax
    body = _below(np.maximum(flanks, shoulders), 1.0, soft)
    body = np.maximum(body, _below(ax, 0.24, soft))  # the neck
    # The patient's right is on the viewer's left, where x is negative.
    right_lung = _lung(x, y, -1.0, anatomy, soft)
    left_lung = _lung(x, y, 1.0, anatomy, soft)
    lungs = np.maximum(right_lung, left_lung)

    texture = _smooth_noise(rng, len(x), 14)
    tissue = 0.50 + 0.06 * y + 0.03 * texture
    picture = body * tissue

    # The lung: dark, brighter towards hilum and base, with vessels that fan out from the hilum.
    hilum_distance = np.hypot((ax - 0.17) / 0.8, y + 0.02)
    fan = np.arctan2(y + 0.02, ax - 0.12)
    near_hilum = np.exp(-((hilum_distance / 0.38) ** 2))
    branches = np.abs(np.cos(5.0 * fan + anatomy.vessel_phase)) ** 3
    vessels = near_hilum * branches
    air = 0.19 + 0.05 * (y + 0.5) + 0.02 * texture
    hilum = np.exp(-((hilum_distance / 0.15) ** 2))
    parenchyma = air + 0.16 * vessels + 0.12 * hilum
    for finding in case.findings:
        match finding.kind:
            case "pneumothorax":
                parenchyma = _pneumothorax(
                    finding,
                    case.size,
                    parenchyma,
                    x,
                    y,
                    anatomy,
                    soft,
                )
            case "consolidation":
                parenchyma = _consolidation(
                    finding,
                    case.size,
                    parenchyma,
                    rng,
                    x,
                    y,
                )
            case "nodule":
                parenchyma = _nodule(
                    finding,
                    case.size,
                    parenchyma,
                    rng,
                    x,
                    y,
                    soft,
                )
    picture = picture * (1.0 - lungs) + lungs * parenchyma

    picture = _mediastinum(case, picture, anatomy, x, y, soft)
    above_abdomen = _below(y, 0.75, 0.1)
    picture += 0.09 * _ribs(anatomy, ax, y) * body * above_abdomen
    picture += _clavicles(ax, y, soft) * 0.20 * body
    # Fluid last: it lies in front of ribs and heart and hides them.
    for finding in case.findings:
        if finding.kind == "effusion":
            fluid = _fluid(
                finding,
                case.size,
                x,
                y,
                anatomy,
                soft,
            )
            density = 0.34 + 0.36 * finding.contrast + 0.02 * texture
            picture = picture * (1.0 - fluid) + fluid * density
    return np.asarray(picture, dtype=np.float32)


def _lung(x: Field, y: Field, side: float, anatomy: Anatomy, soft: float) -> Field:
    """One lung: a superellipse that narrows towards the apex, cut by the dome of its half of the diaphragm."""
    inside = _below(
        _lung_radius(x, y, side, anatomy),
        1.0,
        3.0 * soft,
    )
    return inside * _below(y - _dome(x, side, anatomy), 0.0, soft)


def _lung_radius(x: Field, y: Field, side: float, anatomy: Anatomy) -> Field:
    """1 on the lung's border (without the diaphragm), below 1 inside."""
    fall = (y + 0.72) / 1.40  # 0 at the apex, about 1 at the base
    centre = 0.33 + 0.09 * fall
    widening = np.clip(fall, 0.0, 1.1)
    half_width = 0.30 * anatomy.lung_width * (0.86 + 0.34 * widening)
    across = np.abs((side * x - centre) / half_width) ** 2.5
    down = np.abs((y - 0.08) / 0.80) ** 2.7
    return np.asarray((across + down) ** 0.4, dtype=np.float32)


def _dome(x: Field, side: float, anatomy: Anatomy) -> Field:
    """The height of the diaphragm: a dome that falls to the costophrenic angle; the right one stands higher."""
    top = anatomy.diaphragm - (0.04 if side < 0 else 0.0)
    away = side * x - 0.33
    steepness = np.where(away > 0, 1.9, 0.55)  # towards the side it falls faster than towards the heart
    return np.asarray(top + steepness * away**2, dtype=np.float32)


def _mediastinum(case: PhantomCase, picture: Field, anatomy: Anatomy, x: Field, y: Field, soft: float) -> Field:
    """Spine, great vessels with the aortic knob, trachea, heart, the stomach's bubble."""
    column_width = 0.115 + 0.03 * (y > 0) * y
    column = _below(np.abs(x), column_width, 2 * soft)
    # Vessels have blurred borders: they move while the picture is taken.
    knob_distance = np.hypot((x - 0.10) / 0.10, (y + 0.26) / 0.12)
    knob = _below(knob_distance, 1.0, 12 * soft)
    border_distance = np.hypot((x + 0.08) / 0.075, (y + 0.15) / 0.40)
    right_border = _below(border_distance, 1.0, 12 * soft)
    centre = np.maximum(np.maximum(column, knob), right_border)
    picture = picture * (1 - centre) + centre * 0.66
    vertebrae = np.cos(2 * np.pi * y / 0.145)
    picture += 0.05 * _below(np.abs(x), 0.07, soft) * vertebrae
    trachea = _below(np.abs(x), 0.040, soft) * _below(y, -0.20, 0.05)
    picture = picture - 0.22 * trachea

    width = anatomy.heart_width
    for finding in case.findings:
        if finding.kind == "cardiomegaly":
            width += case.size * (0.13 + 0.13 * finding.extent + 0.04 * (finding.contrast - 0.65))
    grown = width / 0.30
    # A large heart grows to the left, and upwards from the diaphragm that it lies on.
    heart_x = 0.125 + 0.10 * (width - 0.30)
    heart_y = 0.30 - 0.08 * (grown - 1.0)
    tilt_x = (x - heart_x) + 0.30 * (y - heart_y) * -1.0
    heart_height = 0.275 * grown**0.5
    heart_distance = np.hypot(tilt_x / width, (y - heart_y) / heart_height)
    heart = _below(heart_distance, 1.0, 5 * soft)
    # What is denser than the heart, the spine among it, shines through.
    picture = picture * (1 - heart) + heart * np.maximum(picture, 0.70)
    bubble_distance = np.hypot((x - 0.40) / 0.13, (y - anatomy.diaphragm - 0.17) / 0.075)
    bubble = _below(bubble_distance, 1.0, 8 * soft)
    return np.asarray(picture - 0.20 * bubble, dtype=np.float32)


def _ribs(anatomy: Anatomy, ax: Field, y: Field) -> Field:
    """Posterior ribs: bands that arch over the midline and fall towards the side."""
    arch = y - 0.42 * (ax - 0.10) ** 1.0 + 0.10 * np.cos(3.0 * ax)
    wave = np.cos(2 * np.pi * arch / 0.215 + anatomy.rib_phase)
    bands = np.clip(wave, 0.0, 1.0) ** 0.8
    edge = _below(np.abs(ax - 0.44), 0.36, 0.05)
    return np.asarray(bands * edge, dtype=np.float32)


def _clavicles(ax: Field, y: Field, soft: float) -> Field:
    bend = 0.10 * np.sin(4.5 * (ax - 0.10))
    line = np.abs(y + 0.585 + 0.26 * (ax - 0.10) - bend)
    bone = _below(line, 0.030, 2 * soft)
    length = _below(np.abs(ax - 0.42), 0.33, 2 * soft)
    return np.asarray(bone * length, dtype=np.float32)


def _side(finding: Finding) -> float:
    return -1.0 if finding.side == "right" else 1.0


def _fluid(finding: Finding, size: float, x: Field, y: Field, anatomy: Anatomy, soft: float) -> Field:
    """Pleural fluid: all below a meniscus, concave upwards, that climbs the side wall; it hides the diaphragm."""
    side = _side(finding)
    extent = finding.extent
    bottom = anatomy.diaphragm + 0.26
    lateral = np.clip((side * x - 0.12) / 0.58, 0.0, 1.0)
    level = anatomy.diaphragm + 0.06 - 0.46 * extent
    climb = (0.10 + 0.20 * extent) * lateral**4
    surface = level - climb + 0.05 * (1 - lateral) ** 2
    # However little it is, it fills the angle: that is what a reader looks for.
    blunted_angle = anatomy.diaphragm + 0.10 - (0.30 + 0.1 * extent) * lateral**3
    surface = np.minimum(surface, blunted_angle)
    if size != 1.0:  # drawn down towards the bottom of the angle
        surface = bottom - size * (bottom - surface)
    chest_wall = _below(
        _lung_radius(x, y, side, anatomy),
        1.0,
        3.0 * soft,
    )
    inside = chest_wall * (side * x > 0.05)
    depth = _below(y - _dome(x, side, anatomy), 0.10, 0.30)
    below_surface = _below(surface - y, 0.0, 2 * soft)
    return np.asarray(below_surface * inside * depth, dtype=np.float32)


def _pneumothorax(
    finding: Finding,
    size: float,
    parenchyma: Field,
    x: Field,
    y: Field,
    anatomy: Anatomy,
    soft: float,
) -> Field:
    """Air around a lung that has fallen towards its hilum: black, without vessels, up to a thin bright edge."""
    side = _side(finding)
    contrast = finding.contrast
    shrink = 1.0 - size * (0.14 + 0.30 * finding.extent)
    # The collapsed lung's border is the whole lung's, drawn nearer to the hilum.
    to_hilum_x = 0.16 * side
    to_hilum_y = 0.22
    inner_x = to_hilum_x + (x - to_hilum_x) / (shrink + 0.06 * size)
    inner_y = to_hilum_y + (y - to_hilum_y) / shrink
    radius = _lung_radius(inner_x, inner_y, side, anatomy)
    outside = 1.0 - _below(radius, 1.0, 2 * soft)
    edge_width = max(0.022, 1.6 * soft)  # not below a pixel, or it would be lost in small pictures
    edge = np.exp(-(((radius - 1.0) / edge_width) ** 2))
    on_side = (side * x > 0).astype(np.float32)
    air = 0.015 + 0.05 * (1.1 - contrast)
    collapsed = parenchyma + 0.13 * contrast
    picture = outside * air + (1 - outside) * collapsed + 0.34 * contrast * edge
    return np.asarray(on_side * picture + (1 - on_side) * parenchyma, dtype=np.float32)


def _consolidation(
    finding: Finding,
    size: float,
    parenchyma: Field,
    rng: np.random.Generator,
    x: Field,
    y: Field,
) -> Field:
    """A patch of filled airspaces: ragged, ill-defined, with a few dark bronchi."""
    side, upper = _side(finding), finding.zone == "upper"
    centre_x = side * (rng.uniform(0.38, 0.46) if upper else rng.uniform(0.44, 0.52))
    centre_y = rng.uniform(-0.38, -0.28) if upper else rng.uniform(0.20, 0.30)
    reach_x = size * (0.13 + 0.10 * finding.extent)
    reach_y = size * (0.12 + 0.11 * finding.extent)
    # Coarse noise bends the border, fine noise frays it; the clip keeps the patch in one piece.
    coarse = np.clip(
        0.22 * _smooth_noise(rng, len(x), 11),
        -0.3,
        0.3,
    )
    ragged = coarse + 0.18 * _smooth_noise(rng, len(x), 24)
    distance = np.hypot((x - centre_x) / reach_x, (y - centre_y) / reach_y)
    patch = _below(distance + ragged, 1.0, 0.80)
    # Air-filled bronchi are dark rays from the hilum.
    angle = np.arctan2(y - 0.05, x - 0.10 * side)
    bronchi = np.clip(np.cos(26.0 * angle), 0.0, 1.0) ** 6 * 0.06
    return np.asarray(parenchyma + patch * (0.50 * finding.contrast - bronchi), dtype=np.float32)


def _nodule(
    finding: Finding,
    size: float,
    parenchyma: Field,
    rng: np.random.Generator,
    x: Field,
    y: Field,
    soft: float,
) -> Field:
    """A round, sharp-edged opacity."""
    side, upper = _side(finding), finding.zone == "upper"
    radius = size * (0.084 + 0.052 * finding.extent)
    centre_x = side * (rng.uniform(0.38, 0.50) if upper else rng.uniform(0.50, 0.58))
    centre_y = rng.uniform(-0.40, -0.22) if upper else rng.uniform(0.14, 0.30)
    distance = np.hypot(x - centre_x, y - centre_y)
    disc = _below(distance, radius, soft)
    return np.asarray(parenchyma + disc * 0.65 * finding.contrast, dtype=np.float32)


def _marker(x: Field, y: Field) -> Field:
    """The R that marks the patient's right, in the upper corner on the viewer's left."""
    rows = np.floor((y + 0.93) / 0.036).astype(int)
    columns = np.floor((x + 0.93) / 0.036).astype(int)
    inside = (rows >= 0) & (rows < 7) & (columns >= 0) & (columns < 5)
    # Outside the glyph any entry will do, as long as it exists.
    glyph_rows = np.clip(rows, 0, 6)
    glyph_columns = np.clip(columns, 0, 4)
    return np.where(
        inside,
        GLYPH_R[glyph_rows, glyph_columns],
        np.float32(0.0),
    )


def _grain(rng: np.random.Generator, size: int) -> Field:
    """Detector noise: half of it pixel by pixel, half in grains of about a fortieth of the picture."""
    grain = rng.standard_normal((size, size), dtype=np.float32)
    return np.asarray(0.7 * grain + 1.4 * _smooth_noise(rng, size, 40), dtype=np.float32)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Field:
    """Noise of about unit variance that varies over 2 / `cells`; the same field at every `size`."""
    coarse = PIL.Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), PIL.Image.Resampling.BICUBIC), dtype=np.float32)


def _below(value: Field, limit: float | Field, soft: float) -> Field:
    """1 where `value` is below `limit`, 0 above, over an edge of width `soft`."""
    return np.asarray(np.clip((limit - value) / soft + 0.5, 0.0, 1.0), dtype=np.float32)


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Field, Field]:
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2.0 - 1.0
    x, y = (plane.astype(np.float32) for plane in np.meshgrid(axis, axis))
    return x, y


def _caption(case: PhantomCase) -> str:
    if case.more:
        return "\n".join(f"{finding.name} {finding.zone}" for finding in case.findings)
    return f"{case.diagnosis} {case.zone} ({case.difficulty})"


def contact_sheet(cases: list[PhantomCase], size: int = 256, columns: int = 6) -> PIL.Image.Image:
    """The cases side by side, each with its diagnosis and difficulty underneath, for human eyes."""
    from PIL import ImageDraw

    line = 14 * max(1, *(len(case.findings) for case in cases))
    rows = -(-len(cases) // columns)
    sheet = PIL.Image.new(
        "L",
        (columns * size, rows * (size + line)),
        255,
    )
    draw = ImageDraw.Draw(sheet)
    for index, case in enumerate(cases):
        row, column = divmod(index, columns)
        x, y = column * size, row * (size + line)
        sheet.paste(render(case, size), (x, y))
        draw.text(
            (x + 3, y + size + 1),
            _caption(case),
            fill=0,
        )
    return sheet
