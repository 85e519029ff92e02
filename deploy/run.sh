#!/usr/bin/env bash
# python -m train ARGUMENTS, with --resume where the directory of --output-dir has a checkpoint: the same
# line starts a run and goes on with it.
set -euo pipefail
directory=
previous=
for argument in "$@"; do
  if [ "$previous" = --output-dir ]; then directory=$argument; fi
  case $argument in --output-dir=*) directory=${argument#*=} ;; esac
  previous=$argument
done
if [ -z "$directory" ]; then echo "run.sh: expected --output-dir among the arguments, got $*" >&2; exit 2; fi
resume=()
if [ -n "$(ls "$directory/checkpoints" 2>/dev/null)" ]; then resume=(--resume); fi
exec "${MDN_PYTHON:-.venv/bin/python}" -m train "$@" "${resume[@]}"
