"""Protected health information: how much of each kind the scan finds, and how often it sees some where none is.

Recall on drawn notes: Faker's names, numbers and addresses of three locales in sentences as notes have them, one
identifier each. Precision beside clinical sentences that have what looks like one: eponyms, doses, intervals, trials.
With data=FOLDER also published questions, which were written without identifiers: how many are flagged.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from medmm_ray.config import Config
from medmm_ray.engines.phi_scanner import KINDS, PhiScanner
from medmm_ray.steps.curate.phi import text_of
from medmm_ray.steps.ingest import SourceConfig, read_source

LOCALES = ("en_US", "en_GB", "es_ES")
# Sentences around an identifier. The last ones of names and addresses have no mark that a pattern could tell them by.
SENTENCES: Mapping[str, tuple[str, ...]] = {
    "name": (
        "Mr. {last} presents with chest pain that radiates to the left arm.",
        "Patient Name: {first} {last}. Chief complaint: dyspnea on exertion.",
        "{first} {last}, a 54-year-old woman, comes to the clinic with a cough.",
        "{first} {last} is a 67 year old male with a history of COPD.",
        "I saw Mrs {first} {last} in clinic today for her hypertension.",
        "Name: {last}, {first}. Indication: follow-up of a nodule.",
        "A patient named {first} {last} was referred for a biopsy.",
        "The results were discussed with Dr. {last} at the bedside.",
        "{first} {last} (age 45) reports two weeks of fever.",
        "{first} is a 34-year-old nurse with pruritus. What is the diagnosis?",
        "Pt: {first} {last}. Which finding is shown on the radiograph?",
        "Ms. {last} has taken lisinopril 10 mg daily since last year.",
        "{first} {last} was admitted to the intensive care unit.",
        "On examination {last} is afebrile.",
    ),
    "date": (
        "He was admitted on {us} with pneumonia.", "DOB: {us}. Sex: F.", "The scan of {iso} shows a new lesion.",
        "Date of birth {long_us}. Allergies: none.", "She was born on {long_gb} at term.",
        "Discharged {long_us} in stable condition.", "Biopsy performed {long_gb}: adenocarcinoma.",
        "Follow-up CT ({us}) is unchanged.", "Date: {iso}. Study: chest radiograph.", "Seen {dotted} in the clinic.",
        "Last menstrual period {ordinal}.", "Vaccinated on {short_us}.",
    ),
    "phone": (
        "Call the patient at {phone} with the result.", "Phone: {phone}", "Contact number {phone} (daughter).",
        "Reached by telephone ({phone}), she denies chest pain.", "Fax {phone} for the report.", "Tel. {phone}.",
    ),
    "email": (
        "Send the report to {email}.", "Contact: {email}", "The patient ({email}) asked for a second opinion.",
    ),
    "record_number": (
        "MRN: {number}. Chest radiograph, two views.", "Medical record number {number}, bed 4.", "MRN {number}",
        "Patient ID: {mixed}", "Accession number: {mixed}. CT of the abdomen.", "Hospital No. {number}",
        "Medical Record No: {mixed}.", "NHS number {nhs}.", "Acct# {number}",
    ),
    "ssn": ("SSN: {ssn}.", "Social security number {ssn} on file.", "The patient's social is {ssn}."),
    "address": (
        "Lives at {street}.", "Address: {street}, {city}, {state} {zip}.", "Home: {city}, {state} {zip}.",
        "He was found at {street} by the paramedics.",
    ),
    "age_over_89": (
        "A {old}-year-old woman presents with a hip fracture.", "This {old} year old man has dementia.",
        "{old}-year-old male with syncope. What is the next step?", "Age: {old}. Sex: M.", "A woman aged {old} fell.",
        "A {old} y/o female with confusion.",
    ),
}  # fmt: skip
CLEAN = (
    "A {age}-year-old man with Parkinson disease takes levodopa {dose} mg three times daily.",
    "Which of the following is the Babinski sign? {dose} of {more} infants had it.",
    "Blood pressure is {dose}/{age} mm Hg, pulse {age}/min, and temperature 37.{digit} °C (98.{digit} °F).",
    "The hazard ratio was 0.{age} (95% CI 0.{digit}1-0.9{digit}; P = .00{digit}) in {more} patients.",
    "What does the Hardy-Weinberg law state about {age} alleles?", "Is it Hashimoto thyroiditis or Graves disease?",
    "The Mayo Clinic and Johns Hopkins Hospital enrolled {more} patients between 2003 and 2011.",
    "In May 2009 an influenza virus of type A (H1N1) spread; {more} cases were counted.",
    "A {age}-year-old woman has a serum sodium of 13{digit} mEq/L, and creatinine 1.{digit} mg/dL.",
    "Does the Glasgow Coma Scale of {digit} predict outcome after {dose} minutes?",
    "Leopold, Ritgen and Mauriceau described which manoeuvre?", "T{digit} N1 M0 adenocarcinoma, Gleason {digit}+3.",
    "Treatment lasted {age} years; at 9{digit} days {more} of {more} were alive.",
    "The codes are ICD-10 E11.{digit} and CPT 9921{digit}.",
    "The Ann Arbor stage was II. Ki-67 was {age}%.", "Bruton tyrosine kinase 9{digit} kDa binds at Cys48{digit}.",
    "The St. Jude valve was implanted {age} years ago; INR is 2.{digit}.", "PMID {more}{more} reports {dose} cases.",
    "Does vitamin D {dose}0 IU reduce falls in people older than 9{digit}% of the cohort?",
    "A {age}-year-old boy drives with his mother to 5 Court sessions; he has Duchenne muscular dystrophy.",
)  # fmt: skip


class BenchConfig(Config):
    """How many notes are drawn, and where published questions lie."""

    notes: int = Field(2000, ge=len(KINDS))
    """Drawn notes with an identifier, and as many without."""
    data: str = ""
    """Folder of published sets (mirage/, vqa_rad/, pubmedqa/, medxpertqa/); empty: drawn notes alone."""
    seed: int = 0
    """Start of all random numbers."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Recall by kind, precision, and the share of published questions that are flagged."""
    scanner = PhiScanner()
    drawn = list(notes(config))
    num_found: Counter[str] = Counter()
    num_drawn = Counter(kind for kind, _ in drawn)
    for kind, text in drawn:
        num_found[kind] += kind in scanner.kinds(text)
    for kind in KINDS:
        share = num_found[kind] / num_drawn[kind]
        yield Measured(f"recall of {kind}", num_drawn[kind], num_found[kind], share, "", "notes")
    total = sum(num_found.values())
    yield Measured("recall of all kinds", len(drawn), total, total / len(drawn), "≥ 0.9", "notes")
    num_false = sum(bool(scanner.kinds(text)) for text in clean_notes(config))
    share = total / max(1, total + num_false)
    yield Measured("precision, as many notes without", total + num_false, total, share, "≥ 0.95", "notes")
    if config.data:
        yield from _published(config, scanner, console)


def notes(config: BenchConfig) -> Iterator[tuple[str, str]]:
    """Drawn notes with the kind of their identifier, as many of each kind."""
    rng = random.Random(config.seed)
    draws = [_drawer(locale, config.seed) for locale in LOCALES]
    for place in range(config.notes):
        kind = KINDS[place % len(KINDS)]
        sentence = rng.choice(SENTENCES[kind])
        yield kind, sentence.format_map(rng.choice(draws)(rng))


def clean_notes(config: BenchConfig) -> Iterator[str]:
    """Drawn notes without an identifier."""
    rng = random.Random(config.seed + 1)
    for _ in range(config.notes):
        values = {"age": rng.randint(2, 89), "dose": rng.randint(100, 199), "more": rng.randint(1000, 9999)}
        yield rng.choice(CLEAN).format(digit=rng.randint(0, 9), **values)


def _drawer(locale: str, seed: int) -> Callable[[random.Random], Mapping[str, str]]:
    """Identifiers of a locale."""
    from faker import Faker

    fake, american = Faker(locale), Faker("en_US")
    fake.seed_instance(seed)
    american.seed_instance(seed)
    phones = fake if locale != "es_ES" else american

    def draw(rng: random.Random) -> Mapping[str, str]:
        day = fake.date_of_birth(minimum_age=0, maximum_age=89)
        return {
            "first": fake.first_name(), "last": fake.last_name(), "phone": phones.phone_number(), "email": fake.email(),
            "us": f"{day:%m/%d/%Y}", "iso": f"{day:%Y-%m-%d}", "long_us": f"{day:%B} {day.day}, {day.year}",
            "long_gb": f"{day.day} {day:%B} {day.year}", "dotted": f"{day:%d.%m.%Y}", "short_us": f"{day:%m/%d/%y}",
            "ordinal": f"{day:%b} {day.day}th, {day.year}", "number": str(rng.randint(10**5, 10**8)),
            "mixed": f"{rng.choice('ABCX')}{rng.randint(10**6, 10**8)}", "ssn": american.ssn(),
            "nhs": f"{rng.randint(100, 999)} {rng.randint(100, 999)} {rng.randint(1000, 9999)}",
            "street": american.street_address(), "city": american.city(), "state": american.state_abbr(),
            "zip": american.postcode(), "old": str(rng.randint(90, 108)),
        }  # fmt: skip

    return draw


def _published(config: BenchConfig, scanner: PhiScanner, console: Console) -> Iterator[Measured]:
    for name in ("mirage", "vqa_rad", "pubmedqa", "medxpertqa_text"):
        folder = Path(config.data) / name.removesuffix("_text")
        if not folder.is_dir():
            continue
        questions = read_source(SourceConfig(name=name, path=str(folder))).questions
        by_kind: Counter[str] = Counter()
        num_flagged = 0
        started = time.process_time()
        for question in questions:
            kinds = scanner.kinds(text_of(question.question, question.options, question.answer))
            num_flagged += bool(kinds)
            by_kind.update(kinds)
        seconds = time.process_time() - started
        counts = ", ".join(f"{kind} {count}" for kind, count in by_kind.most_common())
        console.print(
            f"[dim]{name}: {1000 * seconds / len(questions):.2f} ms of CPU a question; {counts or 'none'}[/dim]"
        )
        share = num_flagged / len(questions)
        yield Measured(f"{name}: flagged", len(questions), num_flagged, share, "≤ 0.02", "questions")
