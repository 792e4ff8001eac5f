# Starts a run's processes and asks for the job's requeue when it was preempted.
# Sourced by the sbatch files, with the arguments of main_cmd.py behind it.
# shellcheck shell=bash

# Signals to the whole job reach this shell too, which must live to ask for the requeue. A handler,
# not an empty string: srun would inherit being deaf.
trap ':' TERM USR1

# srun starts the processes itself, without torchrun: the job step's signals reach them directly, and
# what it says of each one's place main_cmd.py reads (utils/launch.py).
#   --kill-on-bad-exit  one process that ends in error takes the others along at once
code=0
srun --kill-on-bad-exit=1 --export=ALL "${PYTHON:-python}" main_cmd.py "$@" || code=$?

# srun ends with the highest of its processes' codes: 75 says that they stopped for a signal, and
# that nothing is lost; the job goes back into the queue and carries on. 138 is USR1 in the first
# seconds, before Python could answer. Whatever else went wrong would go wrong again, and is left to
# you.
if [[ $code -eq 75 || $code -eq 138 ]]; then
    echo "preempted with nothing lost: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
