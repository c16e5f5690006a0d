"""A run's result behind OpenAI's API, for programs that speak it."""
