"""Every figure and every training target, as pure functions on numbers and label rows."""
