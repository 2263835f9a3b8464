"""GGUF: the plan of a file, its metadata and vocabulary, and the writer that streams it."""
