"""Data sets: how a directory of videos is read as a list of labelled clips, and synthetic ones."""
