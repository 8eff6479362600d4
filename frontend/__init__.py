"""Hugging Face directory, hub id or GGUF file -> `nn` module and lazily read weights."""
