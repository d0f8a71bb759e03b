"""How ranks share the work: backends, meshes, sharding, collectives. Knows neither the model nor the data."""
