"""What the steps hand on: records, the tables that hold them, columns of labels, and the sources of raw data."""
