"""Measuring the machine and the code on it."""
