# What both sbatch files run on the first node: find the checkpoint, start the ranks with srun, requeue.
#
# srun starts the ranks itself, so that every one of them gets the cluster's signals: --signal=USR1@300 five minutes
# before the time limit, SIGTERM when the job is preempted. (The `deepspeed` launcher would die of them and pass none
# on.) Ranks that were asked to end save and exit with 75; see vla/preemption.py for what a resumed run repeats.
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
    --run_dir=*) run_dir="${!i#--run_dir=}" ;;
    --run_dir) j=$((i + 1)) && run_dir="${!j:-}" ;;
    esac
done
if [ -z "$run_dir" ]; then
    echo "error: give --run_dir: a job that comes back from the queue finds its checkpoints there" >&2
    exit 2
fi

resume=()
if compgen -G "$run_dir/checkpoints/iteration_??????" >/dev/null; then
    resume=(--resume "$run_dir")
elif [ -e "$run_dir" ]; then # killed before its first checkpoint: start again, throw nothing away
    mv "$run_dir" "$run_dir.lost.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
fi

export MASTER_ADDR MASTER_PORT DEEPSPEED_TIMEOUT="${DEEPSPEED_TIMEOUT:-30}" PYTHON="${PYTHON:-.venv/bin/python}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
logs="${run_dir%/}.logs"
mkdir -p "$logs"
echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST," \
    "${resume[*]:-a new run}; logs in $logs"

# --wait: seconds that the others have once one rank has ended; srun's exit code is the highest of all ranks'
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=120 --open-mode=append --output="$logs/rank_%t.log" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec "$PYTHON" "$@"' rank "$@" "${resume[@]}"
code=$?
echo "$(date '+%F %T') the ranks ended with exit code $code"
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
