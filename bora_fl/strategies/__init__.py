"""Aggregation strategies: pure functions on factors, and a table of presets."""
