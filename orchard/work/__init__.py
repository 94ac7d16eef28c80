"""The parts of a worker: the VMs of its host reconciled with the controller, heartbeats, reports, requests."""
