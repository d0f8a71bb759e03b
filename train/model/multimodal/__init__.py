"""Images and video as input: patches to rows of the hidden size, rows to their placeholders."""
