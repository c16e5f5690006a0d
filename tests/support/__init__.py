"""What several test files share; tests find it through pytest's `pythonpath`."""
