"""The long run: the `tuner`, one `convolution` with its `candidates`, and the `journal`."""
