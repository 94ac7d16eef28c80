#!/bin/sh
# The stage `cleanup` of GitLab Runner's custom executor: deletes the job's VM.
set -eu
orchard delete vm "gitlab-$CUSTOM_ENV_CI_JOB_ID"
