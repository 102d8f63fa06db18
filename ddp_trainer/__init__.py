"""LEARNING: the model, the loop and everything round it. Pixels are the business of `data_prep`."""
