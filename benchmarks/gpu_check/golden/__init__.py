"""Golden dumps: tiny PTX kernels, one an instruction, and what a GPU makes of them.

    python -m benchmarks.gpu_check.golden FILE      on a GPU: runs them all and writes their outputs

tests/benchmarks/test_golden.py replays benchmarks/results/<device>/golden.json in the emulator. `kernels` lists them
for both.
"""
