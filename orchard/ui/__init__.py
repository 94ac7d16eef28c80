"""The dashboard: a page, its script, its style sheet and its icon, as browsers get them. handlers/page.py serves them."""
