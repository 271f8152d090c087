# Copy to site.sh, which git ignores, and adapt it to your cluster: environment.sh sources it first.
# shellcheck shell=bash disable=SC2034

# Modules with Python, the compiler and NCCL.
# module purge
# module load python/3.12 gcc/13 cuda/13

# Options of srun for a container (pyxis). The image has Python and the dependencies; the clone is mounted at its own path.
# container=(--container-image="$PWD/mc_ds.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

# A fast local disk of each node, for compile caches; default: $SLURM_TMPDIR or /tmp.
# export NODE_SCRATCH=/local

# The network interface that connects all nodes, and the adapters for NCCL (see environment.sh).
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5_0,mlx5_1
