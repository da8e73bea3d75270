"""What would make a run fail, found before it starts: one finding a check, each with its remedy."""
