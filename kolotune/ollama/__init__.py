"""What Ollama reads, and talking to its server.

The Go TEMPLATE is derived from the trained chat template (`template_derivation`, `template_proof`, `turn_format`,
`go_template_writer`), written into a Modelfile (`modelfile_writer`), and read back as Ollama reads it
(`modelfile_parser`, `go_template_renderer`). `client` talks to a server; `install` and `chat` use it.

Statements about Ollama refer to version 0.33 where no other version is named.
"""
