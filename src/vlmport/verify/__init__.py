"""Compare a bundle with Hugging Face transformers on PyTorch, rung by rung."""
