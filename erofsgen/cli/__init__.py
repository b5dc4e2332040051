"""The command line: one module per verb; click and rich; no logic."""
