"""Drives a recipe: optimizer hooks, clock, scoring, selecting, guards, status."""
