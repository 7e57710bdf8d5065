"""One file a method. Every module here is imported when the registry is first read."""
