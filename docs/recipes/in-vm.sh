#!/bin/sh
# Run a command in a fresh VM, in a copy of this directory; the exit status is the command's.
#
#   in-vm.sh 'make test'
#
# IMAGE names the image. A status of 255 means that the VM could not be used.
set -eu
vm=ci-$(od -An -N8 -tx1 /dev/urandom | tr -d ' ')

# A deletion that fails must not replace the exit status.
trap 'orchard delete vm "$vm" || :' EXIT
trap 'exit 255' INT TERM
orchard create vm "$vm" --image "${IMAGE:-ghcr.io/cirruslabs/macos-tahoe-base:latest}" --ttl 6h --wait --timeout 30m ||
    exit 255
tar -cf - . | orchard ssh vm "$vm" 'mkdir -p work && tar -xf - -C work' || exit 255
printf 'cd work\n%s\n' "$1" | orchard ssh vm "$vm" 'bash -e -s'
