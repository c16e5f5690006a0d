"""Runners: where a stage's processes run."""
