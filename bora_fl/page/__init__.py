"""A run, or a comparison, as one HTML file that asks no network for anything."""
