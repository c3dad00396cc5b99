"""A training run as a job of Slurm: one script, which starts itself again as long as it gets on."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pha.runs import RunFolder
from pha.utils.errors import PHAError

# Some time before the end Slurm tells the shell alone, which tells the processes of the run; srun
# would end them at once. Who cancels the job ends the shell by a signal, and nothing is put back
# into the queue. After a preemption Slurm does that itself.
SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --partition={partition}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={minutes}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{notice}
set -uo pipefail

newest() {{ ls {checkpoints} 2>/dev/null | grep -x 'step-[0-9]*' | sort -V | tail -n 1; }}

trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={notice}
before=$(newest)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 --cpu-bind=none {python} -m torch.distributed.run \\
  --nnodes={nodes} --nproc_per_node={gpus} \\
  --rdzv_backend=c10d --rdzv_endpoint="$head:$((20000 + SLURM_JOB_ID % 40000))" \\
  --rdzv_id="$SLURM_JOB_ID" \\
  -m pha train {words} &
wait $!
code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
if [ $code -ne 0 ] && [ "$(newest)" != "$before" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""
NOTICE = 120
"""Seconds that the processes have for the step they are in and a checkpoint."""


@dataclass(frozen=True)
class ClusterJob:
    """A run for Slurm, one process for each GPU."""

    words: Sequence[str]  # recipe and settings, as given to `pha train`
    out: Path  # run folder
    partition: str
    nodes: int
    gpus: int  # of each node
    hours: float  # after which it is stopped and goes back to the queue

    @property
    def log(self) -> Path:
        """What it prints, in every attempt."""
        return self.out.with_name(f"{self.out.name}.log")

    def script(self) -> str:
        """What sbatch is given.

        An attempt that fails or is stopped goes back to the queue if it has left a newer
        checkpoint than it found, so that a mistake ends the job and a lost node does not.

        Raises:
            PHAError: no nodes, no GPUs or no time.
        """
        enough = 2 * NOTICE <= self.hours * 3600 < math.inf
        if min(self.nodes, self.gpus) < 1 or not enough:
            raise PHAError("--nodes and --gpus must be at least 1, and --hours at least 0.1")
        return SCRIPT.format(
            name=shlex.quote(self.out.name),
            partition=shlex.quote(self.partition),
            nodes=self.nodes,
            gpus=self.gpus,
            minutes=round(self.hours * 60),
            log=shlex.quote(str(self.log)),
            notice=NOTICE,
            checkpoints=shlex.quote(str(RunFolder(self.out).checkpoints)),
            python=shlex.quote(sys.executable),
            words=shlex.join([*self.words, "--out", str(self.out)]),
        )

    def submit(self) -> str:
        """Hand it to Slurm; its number there.

        Raises:
            PHAError: the folder cannot be used, Slurm is not there, or it refuses.
        """
        RunFolder(self.out).require_usable()
        self.out.parent.mkdir(parents=True, exist_ok=True)  # for the log
        try:
            said = subprocess.run(
                ["sbatch", "--parsable"],
                input=self.script(),
                capture_output=True,
                text=True,
                check=True,
            )
        except FileNotFoundError as error:
            raise PHAError(
                "--cluster: there is no sbatch here; run this on a login node of a Slurm cluster, "
                "or see the script with --dry-run"
            ) from error
        except subprocess.CalledProcessError as error:
            raise PHAError(f"--cluster: {error.stderr.strip()}") from error
        return said.stdout.strip().partition(";")[0]
