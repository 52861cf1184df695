"""The shapes models of the Qwen-VL kinds: captions and questions about pictures of any size."""
