"""Measures of the project itself. Run them as modules: python -m experiments.NAME."""
