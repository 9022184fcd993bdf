"""Text to tokens: tokenizers, chat templates, and where the answers stand."""
