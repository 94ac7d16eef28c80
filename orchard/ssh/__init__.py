"""SSH into VMs through the controller: the jump host and commands. Needs the extra `orchard-cluster[ssh]`."""
