#!/bin/sh
# One GitHub Actions job in a fresh VM: registers a runner for one job, and ends with it.
#
#   GITHUB_ORG=example GITHUB_TOKEN=... github-runner.sh LABEL...
#
# The image has GitHub's runner in RUNNER_DIR. Repeat it for a runner that is always there: while :; do github-runner.sh ...; done
set -eu
api=${GITHUB_API_URL:-https://api.github.com}
image=${IMAGE:-ghcr.io/cirruslabs/macos-tahoe-base:latest}
directory=${RUNNER_DIR:-/Users/admin/actions-runner}
vm=github-$(od -An -N8 -tx1 /dev/urandom | tr -d ' ')

body=$(python3 -c 'import json, sys
print(json.dumps({"name": sys.argv[1], "runner_group_id": 1, "labels": sys.argv[2:]}))' "$vm" "$@")
# Secrets go through standard input, since arguments are in the process list.
answer=$(printf 'Authorization: Bearer %s\n' "$GITHUB_TOKEN" |
    curl -sS --fail-with-body -H @- -d "$body" "$api/orgs/$GITHUB_ORG/actions/runners/generate-jitconfig")
config=$(printf '%s' "$answer" | python3 -c 'import json, sys; print(json.load(sys.stdin)["encoded_jit_config"])')
# A deletion that fails must not replace the exit status.
trap 'orchard delete vm "$vm" || :' EXIT
trap 'exit 1' INT TERM
# The startup script is the job: the VM is ready when the runner has ended.
orchard create vm "$vm" --image "$image" --ttl 6h --startup-script @- --follow <<END
cd '$directory'
./run.sh --jitconfig '$config'
END
