"""The methods of the client, by resource; see orchard/client.py."""
