"""What Ollama reads: Modelfiles, and Go templates derived from the chat template that was trained with."""
