# Sourced by the batch scripts of this folder: sets up a job's environment and the command line of srun, `one_task_per_gpu`.
# shellcheck shell=bash

# What is the site's own: modules, a container, interfaces, local disks. site.sh is ignored by git; site.example.sh says what it may set.
container=()
if [[ -f launch/slurm/site.sh ]]; then
    # shellcheck source=/dev/null
    . launch/slurm/site.sh
fi
if [[ -d .venv/bin ]]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi

# Compilers keep what they make on a disk of each node: on a shared file system hundreds of ranks would wait for each other's locks. Kept
# between jobs, so that a requeued one finds it again.
node_scratch=${NODE_SCRATCH:-${SLURM_TMPDIR:-/tmp}}/mc_ds-$(id -un)
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$node_scratch/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$node_scratch/triton}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$node_scratch/extensions}

# Where the ranks meet: the first node of the job, and a port of its own for each job that may share that node (below 32768, where the
# kernel begins to hand out ports). Rank, world size and local rank are srun's: mc_ds/training/ranks/distributed.py reads them.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# --- NCCL -----------------------------------------------------------------------------------------------------------------------------
# Warnings say which rank, host and link failed; INFO, for one short run, which transport was chosen (NET/IB or NET/Socket).
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Ranks find each other over TCP, and NCCL may pick a bridge of containers or virtual machines that other nodes cannot reach. Better still
# is the name of the cluster's interface, e.g. ib0 or bond0.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}
# InfiniBand retries for 4.096 us * 2^22 * retries instead of 2^20: a link that fails over for some seconds slows a step down and does not
# end a run of hundreds of GPUs.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# Each rank remembers its last collectives, and writes them on a time-out: they name the rank that did not come and what it did instead.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# Only for some clusters:
# export NCCL_IB_HCA=mlx5_0,mlx5_1   # compute adapters, where a node also has adapters for storage, which NCCL would use too
# export NCCL_IB_GID_INDEX=3         # RoCE v2, where the adapters are Ethernet
# export NCCL_NVLS_ENABLE=0          # no multicast over NVLink: virtual machines or containers without the fabric manager fail in it
# export GLOO_SOCKET_IFNAME=eth0     # gloo, on CPUs, takes the address of the host's own name; a name, no pattern

# --- Processes ------------------------------------------------------------------------------------------------------------------------
# One task per GPU of every node, with an equal share of the CPUs (srun inherits neither from sbatch). A job of --exclusive has all GPUs of
# its nodes; the number that was asked for counts.
gpus_per_node=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
tasks_per_node=${SLURM_NTASKS_PER_NODE:-${gpus_per_node##*:}}
if [[ ! $tasks_per_node =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the job has no GPUs, so no number of tasks: give sbatch --gpus-per-node=N (without GPUs --ntasks-per-node=N)" >&2
    exit 2
fi
cpus_per_task=$((SLURM_CPUS_ON_NODE / tasks_per_node > 0 ? SLURM_CPUS_ON_NODE / tasks_per_node : 1))
# Offloaded optimizer steps run on these; without a limit every rank would start a thread per CPU of the node.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_task}

# torchrun (srun torchrun ...) kills its ranks so many seconds after it was told to end, 30 by default: a step and a checkpoint take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# A crash in native code leaves a Python traceback in the log.
export PYTHONFAULTHANDLER=1

# One log with the rank before each line; or, with RANK_LOGS=FOLDER, a file for each rank.
output=(--label)
if [[ -n ${RANK_LOGS:-} ]]; then
    mkdir -p "$RANK_LOGS"
    output=(--output="$RANK_LOGS/%x-%j-rank%t.log" --open-mode=append)
fi

# block: neighbouring ranks share a node, so that most traffic of a ring stays on NVLink.
# wait, and not kill-on-bad-exit: when a rank dies the others, blocked in a collective, are ended 60 s later. At once would also hit ranks
# that have saved and are about to say so with their exit code, the moment the first of them has.
# shellcheck disable=SC2034 # train.sbatch uses it
one_task_per_gpu=(
    srun --nodes="$SLURM_NNODES" --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task" --distribution=block
    --kill-on-bad-exit=0 --wait="${SLURM_WAIT:-60}" "${output[@]}" "${container[@]}"
)
