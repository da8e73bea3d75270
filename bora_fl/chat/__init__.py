"""Talk to the language model of a finished run."""
