#!/usr/bin/env bash
# One process of a run under srun: says to PyTorch which one it is, and becomes Python.
set -euo pipefail

export RANK="$SLURM_PROCID"            # among all processes
export WORLD_SIZE="$SLURM_NTASKS"      # how many there are
export LOCAL_RANK="$SLURM_LOCALID"     # among this node's: which GPU it takes
export LOCAL_WORLD_SIZE="$SLURM_NTASKS_PER_NODE" # how many share this node's memory

# exec: signals reach Python itself, with no shell between that would keep them to itself.
exec "${PYTHON:-python}" "$@"
