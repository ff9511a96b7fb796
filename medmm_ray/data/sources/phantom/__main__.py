"""Draws a contact sheet: ``python -m medmm_ray.data.sources.phantom [sheet.png] [seed] [hard]``."""

import sys
from itertools import product

from medmm_ray.data.sources.phantom import HARD, PLAIN, Hardness, contact_sheet, make_case
from medmm_ray.data.sources.phantom.case import DIFFICULTIES, KINDS, PhantomCase, generator


def sheet_cases(seed: int, hardness: Hardness = PLAIN) -> list[PhantomCase]:
    """One case of each kind (columns) at each difficulty (rows)."""
    rng = generator("sheet", seed)
    cases = {}
    for _ in range(2000):  # enough that no kind is missing
        case = make_case(rng, hardness=hardness)
        cases[case.difficulty, case.kind] = case
    return [cases[place] for place in product(DIFFICULTIES, KINDS)]


def main(arguments: list[str]) -> None:
    """Draw the sheet of a seed to a file."""
    path = arguments[0] if arguments else "phantoms.png"
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    contact_sheet(sheet_cases(seed, HARD if "hard" in arguments[2:] else PLAIN)).save(path)


if __name__ == "__main__":
    main(sys.argv[1:])
