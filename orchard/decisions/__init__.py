"""Decisions beside scheduler.py, transitions.py and auth.py: where VMs go, who is admitted, who is alive. Pure."""
