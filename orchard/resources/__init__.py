"""Resources beside schema.py, and their JSON: rules for what clients send, filters, bodies, the stored form. Pure."""
