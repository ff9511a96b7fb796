"""Where the project lies, and where real data lie beside it: what needs them is skipped without."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
REAL_DATA = ROOT.resolve().parent / "shared" / "data"
