"""Video networks, whose stages mix the time steps of a clip. Each is found by its file name."""
