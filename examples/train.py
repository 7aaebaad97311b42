"""Train a network, alone or in several processes: `fused-resnet train` as a script for torchrun.

    python examples/train.py --data cifar-10-batches-bin --out out/resnet20
    torchrun --nproc-per-node 2 examples/train.py --data cifar-10-batches-bin --out out/resnet20

On CPUs the processes talk by gloo, on GPUs by NCCL, one GPU each.
"""

import sys

from fused_resnet.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
