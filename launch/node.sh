#!/usr/bin/env bash
# Starts the ranks of one node, waits for them, and exits with the code of the run.
#
#   launch/node.sh RUN_FOLDER RECIPE [--key value ...]
#
# Environment variables: NUM_NODES (1), NODE_RANK (0), MASTER_ADDR (127.0.0.1), MASTER_PORT (29500), NUM_RANKS (ranks of
# this node; one per GPU, or 1 without a GPU), PATIENCE_S (300; seconds to wait for the name of MASTER_ADDR).
# torchrun always exits with 1 if a rank fails. This script exits with the code of the ranks: 75 if all stopped after a
# checkpoint, 2 if a rank found an error in recipe or data, 3 if there were too many broken clips.
set -euo pipefail

if (($# < 2)) || [[ $1 == *.toml ]]; then
    echo "node.sh: usage: node.sh RUN_FOLDER RECIPE [--key value ...]" >&2
    exit 2
fi
run=$1
shift
nodes=${NUM_NODES:-1}
ranks=${NUM_RANKS:-$({ nvidia-smi --list-gpus 2> /dev/null || true; } | wc -l)} # no GPU: one rank on the CPU
ranks=$((ranks > 0 ? ranks : 1))
address=${MASTER_ADDR:-127.0.0.1}

# The DNS name of a pod appears shortly after the pod starts. If it never does, the error names it.
deadline=$((SECONDS + ${PATIENCE_S:-300}))
until getent hosts "$address" > /dev/null; do
    if ((SECONDS >= deadline)); then
        echo "node.sh: cannot resolve host $address; set MASTER_ADDR to the first node" >&2
        exit 2
    fi
    sleep 1
done

codes=$(mktemp -d)
export FASTAV_EXIT_CODES=$codes # each rank writes its exit code there
torchrun --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$ranks" --master-addr "$address" \
    --master-port "${MASTER_PORT:-29500}" --max-restarts 0 -m fastav.train "$@" --out "$run" \
    --train.num_processes "$((nodes * ranks))" &
job=$!
# Signals go to the ranks, which agree on a step, save and exit. torchrun would kill them after 30 s.
# shellcheck disable=SC2329
signal_ranks() {
    # shellcheck disable=SC2046,SC2317  # a list of numbers; called by the trap
    kill -USR1 $(cat "/proc/$job/task/$job/children") 2> /dev/null || kill -TERM "$job" 2> /dev/null || true
}
trap signal_ranks TERM INT USR1
code=0
while true; do
    code=0
    wait "$job" || code=$?
    kill -0 "$job" 2> /dev/null || break # a signal interrupts `wait`, not the ranks
done

rank_codes=$(cat "$codes"/* 2> /dev/null || true)
num_codes=$(grep --count . <<< "$rank_codes" || true)
rm -rf "$codes"
for user_error in 2 3; do
    if grep --quiet --line-regexp "$user_error" <<< "$rank_codes"; then exit "$user_error"; fi
done
if ((num_codes == ranks)) && ! grep --quiet --invert-match --line-regexp 75 <<< "$rank_codes"; then exit 75; fi
exit "$code"
