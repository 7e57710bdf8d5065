"""Statistics of a model's layers on data, from which compressors and data-dependent starts are computed."""
