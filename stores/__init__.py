"""Stores: bytes on disk. Knows clips, features and fingerprints; numpy in and out."""
