"""Judges of answers that are no rewards."""
