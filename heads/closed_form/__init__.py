"""Heads in closed form: they train nothing by gradient descent. Each is found by its file name."""
