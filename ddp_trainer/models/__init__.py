"""Networks by name, checks of a network, and model.json, from which a network is rebuilt."""
