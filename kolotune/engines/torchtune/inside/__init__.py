"""The folder that torchtune's environment sees of kolotune. What is in it imports nothing else of kolotune."""
