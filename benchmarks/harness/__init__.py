"""What the suites share: cases, clocks, comparison by turns, checks against the definition, and the result files."""
