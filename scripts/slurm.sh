#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on a Slurm cluster: one task for each GPU, and the job goes on by itself when its time is over.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --time=4:00:00 scripts/slurm.sh \
#       --config-name mtbi_demo model.tensor_model_parallel_size=8 model.pipeline_model_parallel_size=2
#
# All arguments go to examples/mtbi_train.py. Two minutes before the time is over Slurm sends SIGUSR1: all processes
# save at the same step and end; the job is then queued again, finds that checkpoint and goes on.
#
# Environment:
#   REPO       root of this repository (default: where sbatch was called)
#   RUN_NAME   folder of the run below EXP_DIR (default: the job's name); it must stay the same from job to job
#   EXP_DIR    (default: nemo_experiments)
#   CONTAINER  image for Slurm's pyxis plugin, see scripts/ngc_run.sh; without it the active environment is used
#SBATCH --job-name=mtbi
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

REPO=${REPO:-${SLURM_SUBMIT_DIR:-$PWD}}
EXP_DIR=${EXP_DIR:-nemo_experiments}
RUN_NAME=${RUN_NAME:-${SLURM_JOB_NAME:-mtbi}}
TASKS=${SLURM_NTASKS_PER_NODE:?set --ntasks-per-node to the number of GPUs of a machine}
NODES=${SLURM_JOB_NUM_NODES:?this script runs under sbatch}

container=()
[[ -n ${CONTAINER:-} ]] && container=(--container-image="$CONTAINER" --container-mounts="$REPO,$PWD")

status=0
srun --kill-on-bad-exit=1 "${container[@]}" python "$REPO/examples/mtbi_train.py" \
    "trainer.devices=${TASKS%%(*}" "trainer.num_nodes=$NODES" \
    "exp_manager.exp_dir=$EXP_DIR" "exp_manager.name=$RUN_NAME" \
    exp_manager.resume_if_exists=true exp_manager.resume_ignore_no_checkpoint=true \
    "$@" || status=$?

# The model is written when training has ended: without it a run that ended well has only stopped.
if ((status == 0)) && ! compgen -G "$EXP_DIR/$RUN_NAME/*.nemo" >/dev/null; then
    echo "stopped before the end: queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
