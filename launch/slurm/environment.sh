# Sourced by the batch scripts of this folder: sets up a job's environment and the command line of srun, `one_task_per_gpu`.
# shellcheck shell=bash

# Settings of the site: modules, a container, interfaces, local disks. See site.example.sh; git ignores site.sh.
container=()
if [[ -f launch/slurm/site.sh ]]; then
    # shellcheck source=/dev/null
    . launch/slurm/site.sh
fi
if [[ -d .venv/bin ]]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi

# Compile caches on a local disk of each node: on a shared file system hundreds of ranks would wait for each other's locks. They are kept
# between jobs, for requeued ones.
node_scratch=${NODE_SCRATCH:-${SLURM_TMPDIR:-/tmp}}/mc_ds-$(id -un)
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$node_scratch/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$node_scratch/triton}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$node_scratch/extensions}

# Rendezvous address: the first node of the job, and a port that differs between jobs on that node (below 32768, where the kernel's own range
# begins). Rank, world size and local rank are set by srun and read by mc_ds/training/ranks/distributed.py.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# --- NCCL -----------------------------------------------------------------------------------------------------------------------------
# WARN names the rank, host and link that failed. INFO, for one short run, also names the transport (NET/IB or NET/Socket).
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Ranks connect over TCP; exclude bridges of containers and virtual machines, which other nodes cannot reach. Better: set the name of the
# cluster's interface, e.g. ib0 or bond0.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}
# InfiniBand retries for 4.096 us * 2^22 * retries (default: 2^20), so that a link that fails over for some seconds only slows down a step
# instead of ending the run.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# Each rank records its last collectives and writes them on a timeout. They show which rank was missing, and what it did instead.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# Only for some clusters:
# export NCCL_IB_HCA=mlx5_0,mlx5_1   # the compute adapters, if nodes have others for storage, which NCCL would use too
# export NCCL_IB_GID_INDEX=3         # RoCE v2, for Ethernet adapters
# export NCCL_NVLS_ENABLE=0          # no multicast over NVLink, which fails in virtual machines or containers without the fabric manager
# export GLOO_SOCKET_IFNAME=eth0     # interface for gloo (CPUs), a name, not a pattern; default: that of the host name's address

# --- Processes ------------------------------------------------------------------------------------------------------------------------
# One task per GPU of every node, with an equal share of the CPUs (srun inherits neither from sbatch). With --exclusive a job has all GPUs of
# its nodes, but only the requested number is used.
gpus_per_node=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
tasks_per_node=${SLURM_NTASKS_PER_NODE:-${gpus_per_node##*:}}
if [[ ! $tasks_per_node =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the job has no GPUs, so the number of tasks is unknown: give sbatch --gpus-per-node=N, or on CPUs --ntasks-per-node=N" >&2
    exit 2
fi
cpus_per_task=$((SLURM_CPUS_ON_NODE / tasks_per_node > 0 ? SLURM_CPUS_ON_NODE / tasks_per_node : 1))
# Threads of an offloaded optimizer; without a limit every rank would start one per CPU of the node.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_task}

# Seconds between TERM to torchrun (srun torchrun ...) and its killing the ranks. The default of 30 is too short for a step and a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# Print a Python traceback after a crash in native code.
export PYTHONFAULTHANDLER=1

# One log, with the rank before each line; with RANK_LOGS=FOLDER one file per rank.
output=(--label)
if [[ -n ${RANK_LOGS:-} ]]; then
    mkdir -p "$RANK_LOGS"
    output=(--output="$RANK_LOGS/%x-%j-rank%t.log" --open-mode=append)
fi

# --distribution=block: neighbouring ranks share a node, so that most traffic of a ring uses NVLink.
# --wait, not --kill-on-bad-exit: if a rank dies, the others, blocked in a collective, are killed after 60 s. Killing them at once would also
# hit ranks that have saved a checkpoint and are about to exit with their own code.
# shellcheck disable=SC2034 # train.sbatch uses it
one_task_per_gpu=(
    srun --nodes="$SLURM_NNODES" --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task" --distribution=block
    --kill-on-bad-exit=0 --wait="${SLURM_WAIT:-60}" "${output[@]}" "${container[@]}"
)
