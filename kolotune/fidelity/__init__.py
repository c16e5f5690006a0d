"""Is the model that is served still the model that was trained?

`selection` chooses chats and prompts. `measure_models` and `measure_gguf` measure in child processes: `tasks` has what
they exchange. `judge` decides which stage changed the model, and writes a `comparison`.
"""
