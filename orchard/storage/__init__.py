"""What is durable: checked, append-only files of JSON lines."""
