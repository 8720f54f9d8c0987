#!/usr/bin/env bash
# Starts the ranks of one node, waits for them, and ends with what the run says of itself.
#
#   launch/node.sh RUN_FOLDER RECIPE [--key value ...]
#
# Reads NUM_NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT (29500) and NUM_RANKS, the ranks of a node (one for each GPU).
# torchrun ends with 1 whatever its ranks end with; this ends as they did: 75 where all were stopped after a checkpoint,
# 2 or 3 where one of them found a mistake in the recipe or too many broken clips.
set -euo pipefail

if (($# < 2)) || [[ $1 == *.toml ]]; then
    echo "node.sh: usage: node.sh RUN_FOLDER RECIPE [--key value ...]" >&2
    exit 2
fi
run=$1
shift
nodes=${NUM_NODES:-1}
ranks=${NUM_RANKS:-$({ nvidia-smi --list-gpus 2> /dev/null || true; } | wc -l)} # where there is none, one on the CPU
ranks=$((ranks > 0 ? ranks : 1))
address=${MASTER_ADDR:-127.0.0.1}

# The name of another pod appears a moment after the pod; one that never does is told by name.
deadline=$((SECONDS + ${PATIENCE_S:-300}))
until getent hosts "$address" > /dev/null; do
    if ((SECONDS >= deadline)); then
        echo "node.sh: the name $address, where the ranks meet, cannot be resolved (MASTER_ADDR)" >&2
        exit 2
    fi
    sleep 1
done

codes=$(mktemp -d)
export FASTAV_EXIT_CODES=$codes # each rank leaves its own there
torchrun --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$ranks" --master-addr "$address" \
    --master-port "${MASTER_PORT:-29500}" --max-restarts 0 -m fastav.train "$@" --out "$run" \
    --train.num_processes "$((nodes * ranks))" &
job=$!
# The ranks are told themselves, and agree on a step, save and end; torchrun would kill them after 30 s.
# shellcheck disable=SC2329
tell_ranks() {
    # shellcheck disable=SC2046,SC2317  # a list of numbers; called by the trap
    kill -USR1 $(cat "/proc/$job/task/$job/children") 2> /dev/null || kill -TERM "$job" 2> /dev/null || true
}
trap tell_ranks TERM INT USR1
code=0
while true; do
    code=0
    wait "$job" || code=$?
    kill -0 "$job" 2> /dev/null || break # a signal ends `wait`, not the ranks
done

told=$(cat "$codes"/* 2> /dev/null || true)
left=$(grep --count . <<< "$told" || true)
rm -rf "$codes"
for mistake in 2 3; do
    if grep --quiet --line-regexp "$mistake" <<< "$told"; then exit "$mistake"; fi
done
if ((left == ranks)) && ! grep --quiet --invert-match --line-regexp 75 <<< "$told"; then exit 75; fi
exit "$code"
