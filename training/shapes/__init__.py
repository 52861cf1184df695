"""The shapes captioner: drawn scenes, their captions, and the recipe that learns them."""
