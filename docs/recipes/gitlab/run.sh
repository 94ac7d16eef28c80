#!/bin/sh
# The stage `run` of GitLab Runner's custom executor: runs the script $1 of the step $2 in the job's VM.
set -eu
vm=gitlab-$CUSTOM_ENV_CI_JOB_ID

status=0
# 3 for a script that fails with any status: 1 and 255 are also those of orchard and ssh when they cannot reach the VM.
orchard ssh vm "$vm" "bash -s || exit 3" <"$1" || status=$?
case $status in
0) ;;
3) exit "$BUILD_FAILURE_EXIT_CODE" ;;
*) exit "$SYSTEM_FAILURE_EXIT_CODE" ;;
esac
