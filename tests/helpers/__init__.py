"""What several test files use: networks, oracles, formulas."""
