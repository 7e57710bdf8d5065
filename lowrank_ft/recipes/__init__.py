"""The recipes behind the command line: fine-tune, compress, evaluate."""
