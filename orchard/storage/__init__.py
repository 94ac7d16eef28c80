"""Durable data: files of checked JSON lines, and the engine that keeps the state in one."""
