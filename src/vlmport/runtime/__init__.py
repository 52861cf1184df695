"""Follow a bundle: pictures and messages in, text out. It knows no model family.

Nothing here imports torch, transformers or the exporting half of the package. Dimensions in
signatures: B rows of a batch, S new tokens, P past tokens, T image tokens, D hidden, K key-value
heads, V vocabulary.
"""
