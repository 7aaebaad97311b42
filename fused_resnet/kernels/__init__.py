"""What computes the operators: csrc's libraries (`compiled`), what kernels are made from (`sources`), `triton`."""
