"""Plants single faults into clean artifacts and counts which of them phiconv catches and names.

python -m benchmarks.faults --out DIR [--seed N] [--count N]
"""
