# Copy to site.sh, which git ignores, and keep what your cluster needs: environment.sh sources it before all else.
# shellcheck shell=bash disable=SC2034

# Modules that Python, the compiler and NCCL come from.
# module purge
# module load python/3.12 gcc/13 cuda/13

# A container (pyxis): the image has Python and the dependencies, the clone is mounted at its own path. Elements are options of srun.
# container=(--container-image="$PWD/mc_ds.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

# A fast disk of each node, for compile caches; $SLURM_TMPDIR or /tmp by default.
# export NODE_SCRATCH=/local

# The interface that all nodes share, and the adapters for NCCL (environment.sh explains both).
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5_0,mlx5_1
