"""Parts of the store: changes and their log, the watchers of changes, and the check of a data directory."""
