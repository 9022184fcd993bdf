"""Models from directories of Hugging Face and from GGUF files."""
