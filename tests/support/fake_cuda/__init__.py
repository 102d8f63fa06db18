"""An imitation of CUDA that computes nothing, for tests on machines without a GPU."""
