"""Use a finished run on texts: classes with their probabilities, or generated responses."""
