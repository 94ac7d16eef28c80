"""What the tests share: clusters, processes, networks, disks and fakes. tests/README.md says which serves what."""
