"""Plots of results and of what a trained head attends to."""
