#!/bin/sh
# The stage `prepare` of GitLab Runner's custom executor: a fresh VM for the job, of the image that the job names.
set -eu
vm=gitlab-$CUSTOM_ENV_CI_JOB_ID
image=${CUSTOM_ENV_CI_JOB_IMAGE:-ghcr.io/cirruslabs/macos-tahoe-base:latest}

# The runner repeats this stage when it fails.
orchard delete vm "$vm" 2>/dev/null || true
# The VM goes by itself if the runner is killed.
orchard create vm "$vm" --image "$image" --ttl 6h --wait --timeout 30m \
    --metadata "gitlab.job=$CUSTOM_ENV_CI_JOB_ID,gitlab.project=${CUSTOM_ENV_CI_PROJECT_ID:-}" ||
    exit "$SYSTEM_FAILURE_EXIT_CODE"
