"""Chat templates: rendered in a sandbox, and the loss mask that follows from what they write."""
