"""Measures speed and costs, and checks machines with GPUs.

Speed is compared with that of plain PyTorch. Costs are those of checkpoints, of the NaN guard and of larger datasets.
"""
