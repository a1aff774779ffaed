"""Trainings and step times: what is planned, run, measured and kept."""
