"""Identifiers of persons are told by kind; medicine's own names and numbers are none."""

import pytest

from medmm_ray.engines.phi_scanner import PhiScanner


@pytest.fixture(scope="module")
def scanner() -> PhiScanner:
    return PhiScanner()


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Patient Name: Jane Roe. DOB: 03/04/1951.", ["name", "date"]),
        ("Mrs. O'Brien was seen.", ["name"]),
        ("Óscar Núñez, a 61-year-old man, has chest pain.", ["name"]),
        ("Admitted on 12 March 2019.", ["date"]),
        ("Call (212) 555-0187, fax 212-555-0188x22.", ["phone"]),
        ("Write to j.roe@example.org.", ["email"]),
        ("MRN: 00482913, accession no. A7751234", ["record_number"]),
        ("SSN 219-09-9999", ["ssn"]),
        ("Lives at 12 Elm Street, Springfield, IL 62704.", ["address"]),
        ("A 93-year-old woman fell.", ["age_over_89"]),
    ],
)
def test_identifiers_by_kind(scanner: PhiScanner, text: str, kinds: list[str]) -> None:
    assert scanner.kinds(text) == kinds


@pytest.mark.parametrize(
    "text",
    [
        "A 45-year-old man with Parkinson disease has a positive Babinski sign.",
        "He is a 34-year-old nurse. It is a 2-year-old lesion.",
        "Blood pressure is 120/80 mm Hg; the hazard ratio was 0.91 (95% CI 0.85-0.98; P = .003).",
        "Sodium 139, potassium 4.1, chloride 102 mEq/L on day 12/14; T2 N1 M0.",
        "The Mayo Clinic enrolled 1,204 patients from May 2003 to June 2011.",
        "At 95 days 90% were alive; aged 90 % of the mean.",
        "A woman from the United States presents with fever. Figure A. He underwent surgery.",
    ],
)
def test_medicine_is_no_identifier(scanner: PhiScanner, text: str) -> None:
    assert scanner.kinds(text) == []
