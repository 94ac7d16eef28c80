"""The VMs of one host: what a driver can do, one VM's task, its supervisor process, its startup script."""
