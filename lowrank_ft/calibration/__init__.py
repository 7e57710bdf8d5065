"""Statistics of a model's layers on data: what compressors and data-made starts are computed from."""
