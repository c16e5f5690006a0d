"""Chat with a run's result in the terminal, or serve it over OpenAI's API."""
