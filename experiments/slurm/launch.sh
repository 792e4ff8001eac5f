# Starts a run's processes and asks for the job's requeue when it was preempted.
# Sourced by the sbatch files, with the arguments of main_cmd.py behind it.
# shellcheck shell=bash

# Where the processes meet: rank 0's node, and a port that another job is unlikely to take. It is
# below 32768, from where the system gives ports to whoever asks.
export MASTER_ADDR MASTER_PORT
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))

# Signals to the whole job reach this shell too, which must live to ask for the requeue. A handler,
# not an empty string: srun would inherit being deaf.
trap ':' TERM USR1

# srun starts the processes itself, without torchrun: the job step's signals reach them directly.
#   --kill-on-bad-exit  one process that ends in error takes the others along at once
#   --export            the whole environment, PYTHON and MASTER_* with it
code=0
srun --kill-on-bad-exit=1 --export=ALL bash experiments/slurm/task.sh main_cmd.py "$@" || code=$?

# srun ends with the highest of its processes' codes: 75 says that they stopped for a signal, and
# that nothing is lost; the job goes back into the queue and carries on. 138 is USR1 in the first
# seconds, before Python could answer. Whatever else went wrong would go wrong again, and is left to
# you.
if [[ $code -eq 75 || $code -eq 138 ]]; then
    echo "preempted with nothing lost: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
