"""``bora-fl evaluate``."""
