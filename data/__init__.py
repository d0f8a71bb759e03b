"""What is trained on: shards, order, packing, loading. Takes plain integers, never a mesh."""
