"""The parts of a controller: its settings, the data that it opens, and its tasks beside the API."""
