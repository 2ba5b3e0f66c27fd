# Both sbatch files run this script on the first node. It finds the checkpoint, starts the ranks with srun, and requeues
# the job.
#
# srun starts the ranks itself, so every rank gets the signals of the cluster: USR1 five minutes before the time limit
# (--signal=USR1@300) and SIGTERM when the job is preempted. The `deepspeed` launcher would die of them without passing
# them on. Ranks that are asked to end save and exit with 75. vla/training/preemption.py says what is then repeated.
#
#   PYTHON             the interpreter (default: .venv/bin/python)
#   DEEPSPEED_TIMEOUT  minutes after which a run ends when a rank does not join a collective (default: 30). It must be
#                      longer than the slowest rank's rollout takes more than the fastest one's.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
trap : TERM USR1 # this shell must outlive its ranks

run_dir=""
for ((i = 1; i <= $#; i++)); do
    case "${!i}" in
    --run[_-]dir=*) run_dir="${!i#--run?dir=}" ;;
    --run[_-]dir) j=$((i + 1)) && run_dir="${!j:-}" ;;
    esac
done
if [ -z "$run_dir" ]; then
    echo "error: --run_dir is missing: give one, since a requeued job finds its checkpoints there" >&2
    exit 2
fi
while [[ $run_dir == ?*/ ]]; do run_dir="${run_dir%/}"; done

# has_checkpoint FOLDER: whether it has a finished checkpoint in checkpoints/
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
elif [ -e "$run_dir" ]; then # killed before its first checkpoint: start again and delete nothing
    if [ -f "$run_dir/lock" ] && command -v flock >/dev/null && ! flock -w 10 "$run_dir/lock" true; then
        echo "error: another process is writing to $run_dir: wait for it, or give another --run_dir" >&2
        exit 2
    fi
    lost="$run_dir.lost.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    while [ -e "$lost" ]; do lost="$lost.again"; done
    if ! mv -- "$run_dir" "$lost"; then
        echo "error: $run_dir has no checkpoint and cannot be renamed: give another --run_dir" >&2
        exit 2
    fi
    echo "$run_dir had no checkpoint and was renamed to $lost"
fi

export MASTER_ADDR MASTER_PORT DEEPSPEED_TIMEOUT="${DEEPSPEED_TIMEOUT:-30}" PYTHON="${PYTHON:-.venv/bin/python}"
MASTER_ADDR=127.0.0.1 # on one node, no other machine can join the ranks
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
logs="$run_dir.logs"
mkdir -p -- "$logs" || exit 2
echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST," \
    "${resume[*]:-a new run}, logs in $logs"

# Since Slurm 22.05, srun does not read the job's --cpus-per-task. Each rank would share one core with all its workers.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

# srun reads % in a file name as the start of a field, and %% as a plain %.
# --wait: seconds that the other ranks have after the first has ended. srun's exit code is the highest of all ranks.
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
