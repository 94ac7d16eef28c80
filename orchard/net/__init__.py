"""Bytes on the network: HTTP/1.1, TLS, TCP and WebSockets. Knows no resource of Orchard and raises errors of its own."""
