"""Durable data: the state, the events and the history of VMs, in files of checked JSON lines or in etcd."""
