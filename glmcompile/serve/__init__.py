"""The engine behind HTTP, in OpenAI's protocol; no tensors here."""
