"""The steps of a run, from raw data to the report; `jobs.graph` has their order. They meet in tables alone."""
