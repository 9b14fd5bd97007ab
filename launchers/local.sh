#!/usr/bin/env bash
# Trains in RUN on this machine, or goes on with it: launchers/local.sh RUN [options of asyncgrpo launch]
set -euo pipefail
if [ $# -eq 0 ]; then
  echo "usage: $0 RUN [--config F] [--actors N] [--learners M] ..." >&2
  exit 2
fi
run="$1"
shift
exec "${ASYNCGRPO:-asyncgrpo}" launch --run-dir "$run" --resume auto "$@"
