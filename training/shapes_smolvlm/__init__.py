"""The shapes model of the SmolVLM kind: captions and questions about one or two pictures."""
