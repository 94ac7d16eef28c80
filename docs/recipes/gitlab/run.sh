#!/bin/sh
# The stage `run` of GitLab Runner's custom executor: runs the script $1 of the step $2 in the job's VM.
set -eu
vm=gitlab-$CUSTOM_ENV_CI_JOB_ID

status=0
orchard ssh vm "$vm" "bash -s" <"$1" || status=$?
case $status in
0) ;;
# ssh could not connect.
255) exit "$SYSTEM_FAILURE_EXIT_CODE" ;;
*) exit "$BUILD_FAILURE_EXIT_CODE" ;;
esac
