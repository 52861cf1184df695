"""The Gradio page of `vlmport app`: captions and conversations, of a model here or on a server."""
