"""Parts of the store: changes and their log, who watches them, and the check of a data directory."""
