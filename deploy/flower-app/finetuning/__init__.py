"""A Flower app of BoRA adapters with a strategy of its own."""
