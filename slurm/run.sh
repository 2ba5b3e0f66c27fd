# What both sbatch files run on the first node: find the checkpoint, start the ranks with srun, requeue.
#
# srun starts the ranks itself, so that every one of them gets the cluster's signals: --signal=USR1@300 five minutes
# before the time limit, SIGTERM when the job is preempted. (The `deepspeed` launcher would die of them and pass none
# on.) Ranks that were asked to end save and exit with 75; see vla/training/preemption.py for what a resumed run repeats.
#
#   PYTHON             the interpreter, .venv/bin/python by default
#   DEEPSPEED_TIMEOUT  minutes after which a collective that a rank does not join ends the run, 30 by default:
#                      longer than the slowest rank's rollout lasts beyond the fastest's
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
trap : TERM USR1 # this shell outlives its ranks, whoever else is signalled

run_dir=""
for ((i = 1; i <= $#; i++)); do
    case "${!i}" in
    --run[_-]dir=*) run_dir="${!i#--run?dir=}" ;;
    --run[_-]dir) j=$((i + 1)) && run_dir="${!j:-}" ;;
    esac
done
if [ -z "$run_dir" ]; then
    echo "error: give --run_dir: a job that comes back from the queue finds its checkpoints there" >&2
    exit 2
fi
while [[ $run_dir == ?*/ ]]; do run_dir="${run_dir%/}"; done

# has_checkpoint FOLDER: of checkpoints/ there, besides those that were not finished
has_checkpoint() {
    local folder
    for folder in "$1"/checkpoints/iteration_[0-9]*; do
        if [[ -d $folder && $folder =~ /iteration_[0-9]{6,}$ ]]; then return 0; fi
    done
    return 1
}

resume=()
if has_checkpoint "$run_dir"; then
    resume=(--resume "$run_dir")
elif [ -e "$run_dir" ]; then # killed before its first checkpoint: start again, throw nothing away
    if [ -f "$run_dir/lock" ] && command -v flock >/dev/null && ! flock -w 10 "$run_dir/lock" true; then
        echo "error: another process is writing to $run_dir: wait for it, or give another --run_dir" >&2
        exit 2
    fi
    lost="$run_dir.lost.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    while [ -e "$lost" ]; do lost="$lost.again"; done
    if ! mv -- "$run_dir" "$lost"; then
        echo "error: $run_dir holds no checkpoint and can not be moved out of the way: give another --run_dir" >&2
        exit 2
    fi
    echo "$run_dir held no checkpoint: it is $lost now"
fi

export MASTER_ADDR MASTER_PORT DEEPSPEED_TIMEOUT="${DEEPSPEED_TIMEOUT:-30}" PYTHON="${PYTHON:-.venv/bin/python}"
MASTER_ADDR=127.0.0.1 # on one node, ranks meet where no other machine can join them
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
logs="$run_dir.logs"
mkdir -p -- "$logs" || exit 2
echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST," \
    "${resume[*]:-a new run}; logs in $logs"

# srun reads % in a file's name as the beginning of a field: %% is itself.
# --wait: seconds that the others have once one rank has ended; srun's exit code is the highest of all ranks'
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=120 --open-mode=append --output="${logs//%/%%}/rank_%t.log" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec "$PYTHON" "$@"' rank "$@" "${resume[@]}"
code=$?
echo "$(date '+%F %T') the ranks ended with exit code $code"
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
