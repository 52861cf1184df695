"""Run a bundle: images and messages in, text out. The runtime knows no model family.

Nothing here imports torch, transformers or the exporting half of the package. Dimensions in
signatures: B rows of a batch, S new tokens, P past tokens, T image tokens, D hidden, K key-value
heads, V vocabulary.

Read in this order; these are the steps of one answer:

1. model.py: `VLM` is what users call. `caption`, `generate` and `stream` prepare requests, run a
   Generation, and return responses. conversation.py does the same turn by turn, and keeps the row
   of the cache between turns.
2. preparing.py: `Preparer.prepare` makes a request:
   - messages.py checks the messages and takes their images out
   - prompt.py renders the chat template and tokenizes the text, with a placeholder for each image
   - images/reading.py reads an image as RGB; images/features.py runs the image processor and the
     vision encoder, and caches the features
   - prompt.py replaces the placeholders by the image tokens, and request.py checks that prompt and
     answer fit into the context
   - graphs/components.py embeds the tokens; `merge_image_features` writes the features in
3. request.py: `Request` is the prompt and its search. decoding/ chooses tokens from logits;
   decoding/__init__.py has its own reading order.
4. generate.py: `Generation` prefills each request and steps all rows together. graphs/cache.py is
   the key-value cache that the decoder writes to.
5. response.py turns tokens into text, at once or piece by piece; `Preparer.response` adds times and
   counts.

6. scheduling/ runs the requests of many callers on one model: `Scheduler.submit` gives a job whose
   events can be streamed. It uses steps 2 to 5, each in a thread of its own. scheduling/__init__.py
   has its reading order.

The rest: graphs/ has a bundle's ONNX graphs as functions on arrays, and their sessions. layouts/
has the same for the layouts that the runtime does not answer with, and runs the golden input of
each. probe.py compares that with the recorded results, to test a device. graphs/devices.py says
which engine runs a component; engines/ tests an engine before a component is trusted to it.
"""
