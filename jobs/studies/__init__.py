"""Finished studies, as they were measured; `jobs.bench` runs them: ``python -m jobs.bench arms``."""
