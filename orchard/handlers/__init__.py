"""The handlers of the REST API, by resource. operations.py names the handler of each operation."""
